"""A tunnel for those strategies that send packets on, where the destination is not on a link of the origin's.

    origin host  @moved: dup to the tunnel's other end ══ VXLAN over UDP 4789, through any routers ══► destination host

Each end makes its own (kernel/tunnel.py), lets nothing come out of it but the connections that were passed through it
(kernel/rules.py, `tunnelled`), and removes it once no pass in its journals needs it. It is tried before anything is
stopped, so that a firewall or a NAT between the two is found then.
"""

from __future__ import annotations

import ipaddress

from ..core.endpoint import Flow, Protocol
from ..core.errors import Refused
from ..journal import TUNNEL, Journal, all_journals, structure_lock
from ..kernel import channel, routing, tunnel
from ..kernel.rules import host_rules, tunnels
from ..kernel.tunnel import Tunnel

_ANSWER_S = 1.0
_SMALL = 100  # bytes
_ADDS = 70  # bytes, at most: IPv6, UDP, VXLAN and Ethernet headers
_IP_VERSIONS = (4, 6)


def between(here: str, there: str) -> Tunnel:
    """Refused where these are no two addresses of one kind."""
    try:
        one = Tunnel(ipaddress.ip_address(here), ipaddress.ip_address(there))
    except ValueError as error:
        raise Refused(f"no tunnel can be made: {error}") from None
    if one.here.version != one.there.version or one.here == one.there:
        raise Refused(f"no tunnel can be made between {one.here} and {one.there}")
    return one


def dig(one: Tunnel, journal: Journal, flow: Flow | None = None) -> int:
    """This end, in the calling thread's network namespace; returns its interface. `flow`: what may come out of it
    here."""
    if flow is not None and tunnel.strict_source_checks():
        raise Refused("rp_filter of this host drops what a tunnel brings",
                      hint="sysctl net.ipv4.conf.all.rp_filter=0, or 2")
    if flow is not None and not routing.is_local(one.here):
        raise Refused(f"{one.here} is not an address of the destination itself: there is a NAT between the hosts",
                      hint="name an address of the destination's own with --via")
    with structure_lock():
        if journal.exists():  # not in a rehearsal
            journal.write(TUNNEL, tunnel=one.name)
        protocol = flow.protocol if flow is not None else Protocol.TCP  # the guard is one for all
        for version in _IP_VERSIONS:
            with host_rules(version, protocol) as rules:
                rules.guard_tunnels()
                if flow is not None and version == flow.ip_version:
                    rules.let_out(flow)
        return one.make()


def try_out(one: Tunnel, flow: Flow) -> None:
    """Refused where the other end does not answer, or not to a packet as large as the peer may send."""
    size = routing.mtu_towards(flow.peer.address)
    wraps = routing.mtu_towards(one.there)
    if one.there.version == 6 and wraps < size + _ADDS:
        raise Refused(f"packets of {size} bytes do not go through a tunnel over IPv6 on a path of {wraps} bytes",
                      hint=f"an IPv4 address of the destination (--via), or a path of {size + _ADDS} bytes")
    if one.answers(flow.ip_version, size, _ANSWER_S):
        return
    if one.answers(flow.ip_version, _SMALL, _ANSWER_S):
        raise Refused(f"packets of {size} bytes do not come through a tunnel to {one.there}, smaller ones do",
                      hint="fragments of UDP must be let through, both ways")
    raise Refused(f"nothing comes back from {one.there} through a tunnel",
                  hint=f"UDP port {tunnel.PORT}, and ICMP echo out of it, must be let through, both ways")


def sweep() -> None:
    """Remove the tunnels, and the devices of `carry`, that no pass needs, in the calling thread's network namespace.
    Idempotent."""
    if not tunnels():
        return
    with structure_lock():
        needed = {record["tunnel"] for journal in all_journals() for record in journal.records()
                  if record["record"] == TUNNEL}
        for name in set(tunnels()) - needed:
            channel.delete(name)
        for version in _IP_VERSIONS:
            with host_rules(version) as rules:
                rules.sweep()
