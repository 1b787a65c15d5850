"""`--return origin`: what the destination says for the connection goes back through the origin host.

    peer --> gateway --> origin host  @moved: dup to the destination     ──► destination host
    peer <-- gateway <-- origin host  @returned: dup to its own next hop ◄── @returning: dup to the origin

For networks that let nobody speak from an address that is not his (RFC 2827, rp_filter=1 at the router). Both ways take
the same link, or the same tunnel. The destination's half is made and tried while staging, with packets of the
connection that nobody sends (kernel/rawpacket.py), since the fence still keeps it from speaking; the origin's is added
with the offer, since the destination may speak as soon as it has committed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
from dataclasses import replace

from ..core.endpoint import Flow, IPAddress, Protocol
from ..core.errors import KernelError, LinkTimeout, ProtocolError, Refused, UsageError
from ..core.messages import Back, Heard
from ..kernel import returning, routing
from ..kernel.rawpacket import Injector
from ..kernel.rules import COPIED, HostRules
from ..transport.wire import Wire
from . import Plan, tunnelled

WAYS = ("direct", "origin")
_KNOCKS_EVERY_S = 0.005
_KNOCKS_FOR_S = 10.0


def check_name(wanted: str) -> None:
    """UsageError for what is no `--return` of any pass."""
    if wanted not in WAYS:
        raise UsageError(f"--return {wanted[:80]!r} is not known", hint="one of direct, origin")


# -- at the origin -----------------------------------------------------------------------------------------------------

def planned(plan: Plan, rules: HostRules, flow: Flow, ttl: int) -> Plan:
    """The plan with this host's own way to the peer, and its rules prepared. `ttl`: with which the program sends.
    Refused where what comes back could not be sent on, or not unseen."""
    if plan.nexthop is None:
        raise Refused("--return origin needs a way between the two hosts for the connection's packets")
    if returning.is_sent_back(rules, flow):
        raise Refused("--return origin: what this host says for the connection goes back through another itself",
                      hint="pass it back to that host, and on from there")
    if ttl % 2:
        raise Refused(f"--return origin: the program sends with a TTL of {ttl}, and the peer would see one less",
                      hint="an even one can be kept up over the hop more")
    if flow.protocol is Protocol.UDP and plan.tunnel is not None:
        raise Refused("--return origin: large datagrams do not come back by a tunnel",
                      hint="an address of the destination on a common link (--via)")
    hop = routing.way_to(flow.peer.address)
    back = hop.gateway if hop.gateway is not None else flow.peer.address
    if back.version != flow.ip_version:
        raise Refused(f"--return origin: the way to the peer leads over the gateway {back}")
    returning.prepare_return(rules, back, hop.interface)
    return replace(plan, back=back, back_interface=hop.interface,
                   reason=f"{plan.reason}; what it says comes back by this host")


def own_address(plan: Plan) -> str:
    """Of this host, where the destination sends what it says."""
    assert plan.nexthop is not None
    return plan.source or str(routing.source_towards(plan.nexthop))


def let_in(rules: HostRules, flow: Flow, plan: Plan) -> None:
    """From now on it may come. Idempotent; nothing where it does not come back."""
    if plan.back is not None:
        returning.let_return(rules, flow, plan.back, plan.back_interface, tunnelled=plan.tunnel is not None)


# -- at the destination ------------------------------------------------------------------------------------------------

def lead_back(message: Back, rules: HostRules, flow: Flow) -> tuple[IPAddress, int]:
    """What the connection says goes to the origin, as soon as anything is said; the next hop and its interface."""
    if message.here:
        tunnel = tunnelled.between(message.here, message.there)
        hop, interface = tunnel.next_hop(flow.ip_version), tunnel.make()
    else:
        try:
            hop = ipaddress.ip_address(message.there)
        except ValueError as error:
            raise Refused(f"nothing can be sent back: {error}") from None
        way = routing.way_to(hop)
        if way.local or way.gateway is not None or hop.version != flow.ip_version:
            raise Refused(f"the origin's address {hop} is not on a link of the destination's",
                          hint="another address of the destination's with --via, or --return direct")
        interface = way.interface
    returning.send_back(rules, flow, hop, interface)
    return hop, interface


def try_back(way: tuple[IPAddress, int], flow: Flow, size: int, wire: Wire) -> None:
    """Knock at the origin until it says whether it has heard."""
    there = Flow(flow.peer, flow.local, protocol=flow.protocol)
    deadline = time.monotonic() + _KNOCKS_FOR_S
    with contextlib.closing(Injector(flow.ip_version, COPIED)) as injector:
        while time.monotonic() < deadline:
            with contextlib.suppress(KernelError):  # no neighbour yet, or a rule of this host's: the origin will say
                injector.knock_at(*way, there, size)
            with contextlib.suppress(LinkTimeout):
                if isinstance(wire.receive(_KNOCKS_EVERY_S), Heard):
                    return
                raise ProtocolError("the origin spoke out of turn")
    raise ProtocolError("the origin does not say whether it hears")
