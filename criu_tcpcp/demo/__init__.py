"""`criu-tcpcp demo`, and what the examples share: a stage of hosts, a download that is passed, its picture.

    stage        hosts in a lab, programs on them, and the real command that passes
    file_server  the application: serves files, and hands "file name and position" over (examples/file_server.py)
    download     the scene: curl downloads, the connection is passed meanwhile, the captures are judged
    sightings    what the peer saw, packet by packet, and which host had sent it
    plot         that as a picture

It stands above the lab and below the command line; nothing else of the product imports it.
"""
