"""A container behind a host of the lab, as engines make them: on a bridge of the host's, with NAT or a route."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator, Sequence
from typing import Any

from criu_tcpcp.core.endpoint import Endpoint, Flow
from criu_tcpcp.lab import Host, Lab
from endpoints import hears
from waiting import until
from world import PORT, World, users

BOXES = {"origin": "box", "destination": "bay"}
NETWORKS = {4: "172.30.0", 6: "fd00:30:"}
#: The peer speaks to another port of the host than the container's own.
SEEN_PORT = PORT + 1

NAT = """
table inet nat {{
    chain prerouting {{
        type nat hook prerouting priority -100
        iifname eth0 meta nfproto ipv4 tcp dport {seen} dnat ip to 172.30.0.2:{port}
        iifname eth0 meta nfproto ipv6 tcp dport {seen} dnat ip6 to [fd00:30::2]:{port}
    }}
    chain postrouting {{
        type nat hook postrouting priority 100
        oifname eth0 ip saddr 172.30.0.0/24 masquerade
        oifname eth0 ip6 saddr fd00:30::/64 masquerade
        {more}
    }}
}}
"""
#: As of engines: in goes what was begun, out goes all.
FORWARD = """
table inet engine {
    chain forward {
        type filter hook forward priority 0; policy drop
        ct state established,related accept
        iifname cbr0 oifname eth0 ct state new accept
        ct status dnat accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
    }
}
"""


def own_address(version: int) -> str:
    return f"{NETWORKS[version]}.2" if version == 4 else f"{NETWORKS[version]}:2"


def put_behind(lab: Lab, host: Host, *, nat: bool) -> None:
    """The host's box loses its own link, and gets one to a bridge of the host's."""
    box = lab.hosts[BOXES[host.name]]
    box.run(["ip", "link", "del", "eth0"])
    for line in ("link add cbr0 type bridge forward_delay 0 mcast_snooping 0", "link set cbr0 up",
                 f"link add inside type veth peer name eth0 netns {box.netns.name}", "link set inside master cbr0 up",
                 "address add 172.30.0.1/24 dev cbr0", "address add fd00:30::1/64 dev cbr0 nodad"):
        host.run(["ip", *line.split()])
    for line in ("link set eth0 up", "address add 172.30.0.2/24 dev eth0", "address add fd00:30::2/64 dev eth0 nodad",
                 "route add default via 172.30.0.1", "route add default via fd00:30::1"):
        box.run(["ip", *line.split()])
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        host.run(["sh", "-c", f"echo 1 >/proc/sys/net/{name}"])
    if nat:
        # As engines that hide whatever leaves the bridge: also what is no container's address.
        host.run(["nft", "-f", "-"], input=NAT.format(seen=SEEN_PORT, port=PORT, more="iifname cbr0 masquerade"))
        host.run(["nft", "-f", "-"], input=FORWARD)
    else:
        lab.gateway.run(["ip", "route", "add", "172.30.0.0/24", "via", str(host.ipv4)])
        lab.gateway.run(["ip", "route", "add", "fd00:30::/64", "via", str(host.ipv6)])
    for place, address in ((host, "fd00:30::1"), (box, "fd00:30::2")):
        with place.enter():
            until(lambda address=address: hears(address), "the address to be there")  # type: ignore[misc]


class BehindWorld(World):
    """`nat`: the peer speaks to the host; else to the container's own address."""

    equally_far = False  # the host that the container is behind is a hop

    def __init__(self, lab: Lab, sides: Sequence[str], *, nat: bool, version: int, **options: Any) -> None:
        self.nat = nat
        self.sides = sides
        super().__init__(lab, version=version, boxes={side: BOXES[side] for side in sides}, **options)

    @property
    def seen(self) -> tuple[str, int]:
        """Whom the peer speaks to, where its connection begins."""
        if self.lab.origin.name not in self.sides:
            return str(self.lab.origin.address(self.version)), PORT
        if self.nat:
            return str(self.lab.origin.address(self.version)), SEEN_PORT
        return own_address(self.version), PORT

    def knows_peer(self, port: int, address: object = None) -> None:
        self.flow = Flow(Endpoint(ipaddress.ip_address(self.seen[0]), self.seen[1]),
                         Endpoint(ipaddress.ip_address(str(self.lab.peer.address(self.version))), port))
        until(lambda: self.serving(self.owner), "the connection to be accepted", every_s=0.02)

    def serving(self, host: Host) -> list[tuple[int, int]]:
        """By the peer's end alone: the other may have two names."""
        assert self.flow is not None
        chosen = ["dport", "=", str(self.flow.peer.port)]
        return users(self.homes[host.name].run(["ss", "-tnpH", "state", "all", *chosen]).stdout)

    def listening(self, host: Host) -> int:
        """The process that listens there, as the host sees it."""
        listed = self.homes[host.name].run(["ss", "-tlnpH", "sport", "=", str(PORT)]).stdout
        return min(int(one.split(",")[0]) for one in listed.split("pid=")[1:])

    def into(self) -> Sequence[str]:
        """The way into the other host's server: `auto` is looked for where the pass is typed."""
        return ("--into", f"accept:{self.listening(self.other)}")


@contextlib.contextmanager
def behind(*sides: str, nat: bool, version: int, apart: Sequence[str] = (), **options: Any) -> Iterator[BehindWorld]:
    with Lab([BOXES[side] for side in sides], apart=apart) as lab:
        for side in sides:
            put_behind(lab, lab.hosts[side], nat=nat)
        lab.keep_order()  # every veth more is one more at which packets overtake each other
        yield BehindWorld(lab, sides, nat=nat, version=version, **options)
