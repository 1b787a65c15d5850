"""A peer that objects: TCP of its own over raw packets, which checks every segment that it gets.

A kernel's TCP forgives much (a lower TSval is dropped, a shrunk window is heeded, a stray segment is answered), so an
application above it does not see what its stack saw. This peer stops at the first thing that no honest endpoint would
say, and tells which packet, which numbers and why. It knows nothing of passes.

    segments        packets <-> bytes; checksums
    judge           what was sent and seen so far, and whether the next segment fits
    tcp             the endpoint, sans I/O: RFC 9293, RFC 7323, RFC 2018, RFC 6298, RFC 5681
    conversation    request and response, or two streams, on top of it
    packets         the sockets, and an address that the kernel does not own
    __main__        the program: python -m criu_tcpcp.lab.strict

The first four are pure: time is an argument, packets are values.
"""
