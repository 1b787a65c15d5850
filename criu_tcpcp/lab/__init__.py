"""Real hosts on one machine, as network namespaces: what demo, tests, benchmarks and examples share.

    with Lab() as lab:
        server = lab.origin.spawn(["my-server"])
        with lab.peer.enter():
            connection = socket.create_connection((str(lab.origin.ipv4), 80))

Nothing outside the lab's own namespaces and directory is touched, and nothing stays. The lab stands beside the product:
it imports `core` and `kernel.netns`, and nothing of the product imports it, except the command `demo`.
"""

from .host import Host
from .lab import Lab
from .leftovers import leftovers
from .weather import Weather

__all__ = ["Host", "Lab", "Weather", "leftovers"]
