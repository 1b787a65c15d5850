"""Planned fail-over: a host is taken out of service, and its clients stay connected.

    planned_failover.py       on this machine: conversations, a pass, the address moves, the host is switched off

The service has an address of its own. First its connections are passed: their packets still come to the old host, which
sends them on. Then the address itself moves, and its new place is announced (a gratuitous ARP, as keepalived sends it):
from then on nothing depends on the old host, and it is switched off. New clients find the service where the old ones
are. The server is ping_pong's: it needs to know nothing of this.

Why not after an unplanned failure, from a copy of the state that was taken some time before? Because the peer has moved
past it. Every byte that the dead host sent after the copy was made has been delivered and acknowledged; a host that
went on from the copy would give the same sequence numbers to other bytes, would acknowledge less than was acknowledged
already, and its clock would step back. The peer would take that for old duplicates, or answer that it has other
numbers, and if the numbers fit by chance, a wrong byte would be taken for a right one. So a state is used once, in the
pass in which it was read, while the peer's packets are held: the destination chooses a number for each pass, and what
comes with another one is turned down. For unplanned failures every byte must be replicated before it is sent, which is
another kind of system.
"""

from __future__ import annotations

import argparse
import ipaddress
import socket
import sys
from pathlib import Path

from criu_tcpcp.core.errors import Refused
from criu_tcpcp.demo import example
from criu_tcpcp.demo.stage import Stage, stage
from criu_tcpcp.lab import Host

PORT = 7000
SERVICE = ipaddress.IPv4Address("10.77.2.100")
_ETHERTYPE_ARP = 0x0806


def announce(host: Host, address: ipaddress.IPv4Address) -> None:
    """Tell everybody on the host's link that the address is here now (RFC 5227 3)."""
    with host.enter(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((host.interface, 0))
        mac = raw.getsockname()[4]
        raw.send(b"\xff" * 6 + mac + _ETHERTYPE_ARP.to_bytes(2, "big") + b"\0\1\10\0\6\4\0\1"
                 + mac + address.packed + bytes(6) + address.packed)


def move_address(here: Stage, old: Host, new: Host) -> None:
    new.run(["ip", "address", "add", f"{SERVICE}/32", "dev", new.interface])
    old.run(["ip", "address", "del", f"{SERVICE}/32", "dev", old.interface])
    announce(new, SERVICE)


def play() -> None:
    server = str(Path(__file__).with_name("ping_pong.py"))
    with stage(print) as here:
        old, new = here.lab.origin, here.lab.destination
        old.run(["ip", "address", "add", f"{SERVICE}/32", "dev", old.interface])
        servers = {host.name: here.start(host, [sys.executable, server, "serve", "--port", str(PORT),
                                                "--listen", "0.0.0.0"]) for host in (old, new)}
        for one in servers.values():
            one.wait_for("ready")
        clients = [example.Client(here, PORT, str(SERVICE)) for _ in range(2)]
        for client in clients:
            client.ask("is anybody there?")
        for descriptor in here.descriptors(servers[old.name]):
            here.pass_connection(servers[old.name], descriptor, new)
        move_address(here, old, new)
        print(f"the service's address {SERVICE} is at the {new.name} now")
        old.collect_processes()
        old.run(["ip", "link", "set", old.interface, "down"])
        print(f"the {old.name} is switched off")
        newcomer = example.Client(here, PORT, str(SERVICE))
        for client in (*clients, newcomer):
            if client.ask("still there?") != "still there?":
                raise Refused(f"{client.name} heard something else")
            print(f"  {client.name}: {'a new client' if client is newcomer else 'an old client'} is answered")


def main() -> int:
    argparse.ArgumentParser(description="a host is taken out of service, its clients stay connected").parse_args()
    return example.run(play)


if __name__ == "__main__":
    sys.exit(main())
