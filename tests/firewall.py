"""A firewall that lets by what it has seen begin, as most do."""

from __future__ import annotations

from criu_tcpcp.lab import Host
from world import PORT, World

#: What it has not seen begin goes neither in nor out nor by, and lo is no exception.
STRICT = """
table inet strict {
    chain common {
        ct state established,related accept
        ct state invalid drop
        tcp dport 22 ct state new accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
    }
    chain served {
        tcp dport %(port)d tcp flags syn / fin,syn,rst,ack ct state new accept
        udp dport %(port)d ct state new accept
    }
    chain input { type filter hook input priority 0; policy drop; jump common; %(more)s; }
    chain output { type filter hook output priority 0; policy drop; jump common; }
    chain forward { type filter hook forward priority 0; policy drop; jump common; jump served; }
}
"""


def firewall(here: World, host: Host, *, loose: int, serves: bool = False) -> None:
    """`serves`: peers may open connections to the port. The firewall is nothing that a pass leaves."""
    for name, value in (("loose", loose), ("be_liberal", 0)):
        host.run(["sh", "-c", f"echo {value} >/proc/sys/net/netfilter/nf_conntrack_tcp_{name}"])
    host.run(["nft", "-f", "-"], input=STRICT % {"port": PORT, "more": "jump served" if serves else "drop"})
    if host.name in here.clean:
        here.clean[host.name] += here.left_at(host)
