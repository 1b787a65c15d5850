"""The way of a connection's packets to the destination: laid and tried before anything is stopped.

Where a tunnel is needed, both ends are made. Then this host knocks: it sends packets of the connection that no peer
sends (kernel/rawpacket.py), as large as the peer may send them, where the connection's are to go, until the destination
has heard one or the time is over.
"""

from __future__ import annotations

import contextlib
import errno
import time
from dataclasses import replace

from .. import carrying
from ..core.endpoint import Flow
from ..core.errors import KernelError, LinkTimeout, ProtocolError, Refused
from ..core.messages import Back, Dig, Dug, Heard, Lay, Listen
from ..core.messages import Refused as RefusedMessage
from ..journal import Journal
from ..kernel import netns, routing
from ..kernel.rawpacket import Injector
from ..kernel.rules import HostRules
from ..kernel.syscalls import boot_id
from ..kernel.tap import KnockListener
from ..redirect import Plan, carry, returned, tunnelled
from ..transport.wire import Wire

_ANSWER_S = 20.0
_KNOCKS_EVERY_S = 0.005
_LISTENS_S = 2.0  # for what the destination sends every few milliseconds


def laid(plan: Plan, flow: Flow, journal: Journal, wire: Wire, comes_by_itself: bool) -> Plan:
    """The plan, with a way that works; Refused where there is none. `comes_by_itself`: the network takes packets to the
    destination, and this way is for those that are held only, which are dropped where it does not work."""
    try:
        if plan.tunnel is not None:
            plan = _dug(plan, flow, journal, wire)
        if plan.nexthop is not None:
            _try(plan, flow, journal, wire)
    except Refused:
        if not comes_by_itself:
            raise
        return replace(plan, nexthop=None, source="")
    return plan


def laid_by_link(why: str, flow: Flow, journal: Journal, wire: Wire, learnt_mtu: int) -> tuple[carry.End, Plan]:
    """This end of a way over the link itself, and the plan of it. `learnt_mtu`: of the way to the peer, by the
    connection."""
    end = carry.lay_at_origin(journal, flow)
    try:
        if journal.exists():  # not in a rehearsal
            carrying.want(journal)
        wire.send(Lay(journal.pass_id, carry.mtu_of_way(flow, learnt_mtu), boot_id(), list(netns.own())))
        _until_dug(wire)
    except BaseException:
        end.close()
        raise
    return end, carry.plan(end.channel, flow, why)


def _dug(plan: Plan, flow: Flow, journal: Journal, wire: Wire) -> Plan:
    tunnel = plan.tunnel
    assert tunnel is not None
    interface = tunnelled.dig(tunnel, journal)
    wire.send(Dig(journal.pass_id, str(tunnel.there), str(tunnel.here)))
    _until_dug(wire)
    tunnelled.try_out(tunnel, flow)
    return replace(plan, interface=interface)


def _until_dug(wire: Wire) -> None:
    """Refused where the destination cannot."""
    answer = wire.receive(_ANSWER_S)
    if isinstance(answer, RefusedMessage):
        raise Refused(answer.reason, hint=answer.hint)
    if not isinstance(answer, Dug):
        raise ProtocolError("the destination answered out of turn")


def led_back(plan: Plan, flow: Flow, rules: HostRules, ttl: int, journal: Journal, wire: Wire) -> Plan:
    """The plan, with a way for what the destination says, too; Refused where nothing comes by it."""
    plan = returned.planned(plan, rules, flow, ttl)
    size = routing.mtu_towards(flow.peer.address)
    with contextlib.closing(KnockListener(Flow(flow.peer, flow.local, protocol=flow.protocol))) as listener:
        there = plan.tunnel.there if plan.tunnel is not None else ""
        wire.send(Back(journal.pass_id, str(there), returned.own_address(plan), size))
        _until_dug(wire)
        heard = listener.hears(size, _LISTENS_S)
    wire.send(Heard(journal.pass_id, heard))
    if not heard:
        raise Refused(f"what the destination says for the connection, in packets of {size} bytes, does not come back "
                      "to this host", hint="does a filter of the destination's, or on the way, drop it?")
    return plan


def _try(plan: Plan, flow: Flow, journal: Journal, wire: Wire) -> None:
    size = routing.mtu_towards(flow.peer.address)
    if _is_heard(plan, flow, size, journal, wire):
        return
    if _is_heard(plan, flow, 0, journal, wire):
        raise Refused(f"packets of {size} bytes do not come to {plan.via} by way of {plan.nexthop}, smaller ones do",
                      hint="the link between the hosts must take what the peer's does")
    raise Refused(f"packets of the connection that are sent on to {plan.nexthop} do not come to the destination",
                  hint="is that address its own, and does no filter on the way drop them? --via names another")


def _is_heard(plan: Plan, flow: Flow, size: int, journal: Journal, wire: Wire) -> bool:
    """Knocked again and again: the destination may listen a little later, and the next hop be found later still. True,
    too, where rules of this host's own let no knock out (`ct state invalid`), which say nothing of the connection."""
    assert plan.nexthop is not None
    deadline, is_kept_in = time.monotonic() + _ANSWER_S, False
    with contextlib.closing(Injector(flow.ip_version, mark=0)) as injector:
        wire.send(Listen(journal.pass_id, size))
        while True:
            try:
                injector.knock_at(plan.nexthop, plan.interface, flow, size)
            except KernelError as error:  # what a rule drops on its way out; else there is no neighbour yet
                is_kept_in |= error.errno == errno.EPERM
            try:
                answer = wire.receive(_KNOCKS_EVERY_S)
                break
            except LinkTimeout:
                if time.monotonic() > deadline:
                    raise
    if not isinstance(answer, Heard):
        raise ProtocolError("the destination answered out of turn")
    return answer.heard or is_kept_in
