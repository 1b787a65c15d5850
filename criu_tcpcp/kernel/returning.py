"""Rules for `--return origin`: what the destination says for a passed connection goes back through the origin host.

    destination  returning_*  output -150       a copy goes to the origin (link or tunnel), the packet itself nowhere
    origin       returned_*   prerouting -299   a copy goes to the next hop of this host's own way to the peer; before
                                                the source check, which takes its source, an address of this host's,
                                                for a martian

A copy, as with `moved`: its route is that to the next hop, so that of a tunnel the locked or unknown MTU of that route
counts, and never one learnt for the peer (tunnel.py). A policy route by a mark would be one for the peer's address:
over IPv6 a tunnel lowers its MTU at the first full packet (net/ipv6/route.c, __ip6_rt_update_pmtu), and the socket,
whose address is not this host's, would never hear of it.

The packet itself may not be dropped: the socket would be told (-EPERM), and TCP take it for not sent
(net/ipv4/tcp_output.c, tcp_write_xmit). It goes to a packet queue that nobody listens to, where it ends without an
error (net/netfilter/nf_queue.c, nf_queue).

One hop more would cost one more of the TTL, which the peer could see: the destination sends them with one more. There
is no addition in nf_tables; initial TTLs but 255 are even, and so the last bit is set.
"""

from __future__ import annotations

import functools
from pathlib import Path

from ..core.endpoint import Flow, IPAddress, Protocol
from ..core.errors import KernelError, Refused
from . import nftables
from .nftables import OUTPUT, Component
from .rules import COPIED, LIFETIME_S, RETURNED, RETURNING, TUNNELLED_SETS, HostRules, living_component, way_name
from .syscalls import failing

_NOBODY = 0x7BFF  # a packet queue; one below those of nfqueue.py


def _returning_component(version: int, protocol: Protocol, hop: IPAddress, interface: int, end: bytes) -> Component:
    away = (nftables.raise_even_ttl(version) + nftables.set_mark(COPIED) + nftables.duplicate(hop.packed, interface)
            + end)
    return living_component(version, protocol, way_name(RETURNING, hop, interface), -150, away, hook=OUTPUT,
                            outgoing=True, first=(nftables.mark_is(COPIED) + nftables.accept(),))


@functools.lru_cache(maxsize=64)
def _returned_component(version: int, protocol: Protocol, hop: IPAddress, interface: int) -> Component:
    """The copy passes by the fence, which keeps this host itself from speaking. What tries the way goes no further."""
    away = nftables.set_mark(COPIED) + nftables.duplicate(hop.packed, interface) + nftables.drop()
    knock = nftables.load_flow(version, protocol, outgoing=True) + nftables.is_knock(protocol) + nftables.drop()
    return living_component(version, protocol, way_name(RETURNED, hop, interface), -299, away, outgoing=True,
                            first=(knock,))


def send_back(rules: HostRules, flow: Flow, hop: IPAddress, interface: int) -> None:
    """At the destination: what the connection says goes to this next hop. Idempotent. Refused where this kernel cannot
    take a packet away without an error."""
    if _is_listened_to():
        raise Refused(f"another program listens to packet queue {_NOBODY} at the destination")
    table = rules.table
    table.create()
    ways = [_returning_component(rules.version, rules.protocol, hop, interface, end)
            for end in (nftables.queue_natively(_NOBODY), nftables.queue_by_xt(_NOBODY))]
    try:
        table.install_first(ways)
    except KernelError as error:
        raise Refused(f"the destination's kernel cannot send packets back to the origin: {error.message}") from None
    table.add(ways[0].sets[0], [flow], LIFETIME_S)


def _is_listened_to() -> bool:
    """In the calling thread's network namespace."""
    listing = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")
    with failing("list packet queues"):
        return listing.exists() and any(int(line.split()[0]) == _NOBODY for line in listing.read_text().splitlines())


def prepare_return(rules: HostRules, hop: IPAddress, interface: int) -> None:
    """At the origin: so that within the freeze it is one element."""
    rules.table.create()
    rules.table.install(_returned_component(rules.version, rules.protocol, hop, interface))


def let_return(rules: HostRules, flow: Flow, hop: IPAddress, interface: int, *, tunnelled: bool) -> None:
    """At the origin: what the destination says goes on to the next hop, once it is out of the tunnel. Idempotent."""
    if tunnelled:
        rules.let_out(_reversed(flow))
    component = _returned_component(rules.version, rules.protocol, hop, interface)
    rules.though_swept(lambda: rules.table.add(component.sets[0], [flow], LIFETIME_S),
                       lambda: prepare_return(rules, hop, interface))


def speak_directly(rules: HostRules, flow: Flow) -> None:
    """At the destination: the inverse of `send_back`. Idempotent."""
    _take_out(rules, RETURNING, flow)


def end_return(rules: HostRules, flow: Flow) -> None:
    """At the origin: the inverse of `let_return`. Idempotent."""
    _take_out(rules, RETURNED, flow)
    rules.guard.remove(TUNNELLED_SETS[rules.protocol], _reversed(flow))


def _take_out(rules: HostRules, prefix: str, flow: Flow) -> None:
    """First of the sets of those that are closing, which would put it back into the others."""
    names = [name for name in rules.table.set_names() if name.startswith(prefix)]
    for name in sorted(names, key=lambda one: not one.endswith("_closing")):
        rules.table.remove(name, flow)


def is_sent_back(rules: HostRules, flow: Flow) -> bool:
    """What this host says for the connection goes to the host that passed it here."""
    return any(rules.table.contains(name, flow) for name in rules.table.set_names() if name.startswith(RETURNING))


def _reversed(flow: Flow) -> Flow:
    return Flow(flow.peer, flow.local, protocol=flow.protocol)
