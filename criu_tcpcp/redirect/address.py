"""`address`: the connection's local address moves to the destination host, and with it all that is spoken there.

    stage      may it go, is nothing left behind, would the destination have it?
    [the pass, bridged: the origin host sends the packets on, as by `forward`]
    reroute    asked again; the origin host removes it; the destination adds it, and tells the link

    origin host        has it ------- removes |                 sends on what still comes for passed connections
    destination host                            adds | announces      has it

It is removed before it is added: at no instant do two hosts answer for it. In between none does, for a round trip of
the SSH channel; the neighbours have the origin host in their tables then, and what is passed is sent on. Connections of
the address that were passed to that destination before live there natively from then on: their diverts find a local
address, and do no harm.

What was decided stands in the origin's journal (`ADDRESS`): "leaving" is written before it is removed, and as long as
that is the last word, `resolve` goes on from there; every step can be repeated. Only the destination's word ends it:
Adopted ("moved"), or a refusal, which says that it does not have it, and never will by this pass; then it comes back
("kept"). The destination writes down which it was: a word that was delayed changes nothing. A pass is never
undone behind this step, so undoing one moves nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..core.address import InterfaceAddress
from ..core.endpoint import Flow, IPAddress
from ..core.errors import KernelError, LinkError, ProtocolError, Refused, TcpcpError
from ..core.messages import Adopt, Adopted, Message
from ..core.messages import Refused as RefusedMessage
from ..faults import Faults
from ..journal import ADDRESS, ORIGIN, Journal, all_journals
from ..kernel import addresses, neighbours, netns, process, routing, sockdiag
from ..kernel.addresses import Held
from ..kernel.rules import host_rules
from ..kernel.syscalls import boot_id
from . import Plan, Setting
from .bridged import Bridged

_NAMED = 5  # connections of those that would stay behind
_NEIGHBOUR_S = 1.0
_MARK = "state.address"  # a file, by which the unit of systemd sees that there is something to do
_LEAVING, _MOVED, _KEPT = "leaving", "moved", "kept"  # at the origin
_ADOPTED, _REFUSED = "adopted", "refused"  # at the destination


class AddressAtOrigin(Bridged):
    """The bridge for as long as it takes, and then the address."""

    def __init__(self, plan: Plan, setting: Setting) -> None:
        super().__init__(plan, setting)
        self._plan, self._setting = plan, setting

    def announce(self, flow: Flow) -> None:
        with self._setting.reach.inside():
            self._propose(flow)

    def reroute(self, flow: Flow) -> None:
        """What came meanwhile, or a destination that would not have it any more, leaves the address where it is, and
        the connection bridged."""
        reach = self._setting.reach
        with reach.inside():
            standing = reach.journal.field(ADDRESS)
            if standing is None:
                held = self._propose(flow)
                reach.journal.forget(_MARK)  # of a try that could not be written
                reach.journal.save(_MARK, b"")
                reach.journal.write(ADDRESS, phase=_LEAVING, held=held.to_json())
                standing = reach.journal.field(ADDRESS)
            if standing is not None and standing["phase"] == _LEAVING:
                _hand_over(Held.from_json(standing["held"]), reach)

    def _propose(self, flow: Flow) -> Held:
        """Refused where it may not go, or the destination cannot have it; nothing is touched."""
        reach = self._setting.reach
        held = _own(flow.local.address)
        _refuse_needed(held, reach.reached_at)
        _refuse_left_behind(flow, self._plan)
        answer = reach.ask(Adopt(reach.journal.pass_id, held.what.to_json(), addresses.hardware(held.interface), False))
        if isinstance(answer, RefusedMessage):
            raise Refused(f"{flow.local.address} cannot move to {self._setting.destination}: {answer.reason}",
                          hint=answer.hint)
        return held


@dataclass(frozen=True)
class Reach:
    """What a strategy needs that speaks with the destination itself. `name`: who asks, for faults.py; `ask`: says
    something, and returns the answer, over a new link if need be; `namespace`: where the origin process's network is;
    `reached_at`: the address that SSH reaches the destination at, if it is known."""

    name: str
    journal: Journal
    ask: Callable[[Message], Message]
    namespace: int | None = None
    reached_at: IPAddress | None = None

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        if self.namespace is None:
            yield
        else:
            with netns.enter(self.namespace):
                yield


def is_under_way(journal: Journal) -> bool:
    """Neither host is known to have it: `finish` is due. What an earlier boot left, that boot's end has settled."""
    standing = journal.field(ADDRESS)
    return journal.side == ORIGIN and standing is not None and standing["phase"] == _LEAVING \
        and standing["boot"] == boot_id()


def finish(reach: Reach) -> None:
    """Where `is_under_way`: from wherever it came to a halt. Refused: it is here again."""
    standing = reach.journal.field(ADDRESS)
    if standing is not None and is_under_way(reach.journal):
        _hand_over(Held.from_json(standing["held"]), reach)


def _hand_over(held: Held, reach: Reach) -> None:
    faults = Faults()
    faults.stop(f"{reach.name}:remove address")
    try:
        faults.fail(f"{reach.name}:remove address")
        addresses.remove(held.what, held.interface)
    except KernelError:
        _settle(reach.journal, _KEPT)
        raise
    faults.stop(f"{reach.name}:hand over address")
    hardware = ""
    with contextlib.suppress(KernelError):  # the interface has gone, and is not needed but to put it back
        hardware = addresses.hardware(held.interface)
    try:
        answer = reach.ask(Adopt(reach.journal.pass_id, held.what.to_json(), hardware, True))
    except LinkError as error:
        raise LinkError(f"{held.what.address} was removed here, and the destination does not say whether it has it: "
                        f"{error.message}", hint=f"criu-tcpcp resolve {reach.journal.pass_id}") from None
    if isinstance(answer, RefusedMessage):
        addresses.add(held.what, held.interface)
        neighbours.announce(held.what.address, held.interface, hardware)
        _settle(reach.journal, _KEPT)
        raise Refused(f"{held.what.address} stays at this host, which sends the packets on: {answer.reason}",
                      hint=answer.hint)
    if not isinstance(answer, Adopted):
        raise ProtocolError("the destination answered out of turn")
    _settle(reach.journal, _MOVED)
    if answer.left:
        raise Refused(answer.left)


def _settle(journal: Journal, phase: str) -> None:
    journal.write(ADDRESS, phase=phase)
    journal.forget(_MARK)


# -- what may go -------------------------------------------------------------------------------------------------------

def _own(address: IPAddress) -> Held:
    """As this host has it. Refused where it is not to be moved, whatever depends on it."""
    found = [one for one in addresses.held(address.version) if one.what.address == address]
    if not found:
        raise Refused(f"{address} is not an address of this host, so it cannot move from here",
                      hint="--redirect forward; or pass the connection on from the host that has it")
    held = found[0]
    where = f"{address} of {held.name}"
    if len(found) > 1:
        raise Refused(f"{address} is an address of several interfaces: {', '.join(one.name for one in found)}")
    if held.has_other_end or not addresses.hardware(held.interface):
        raise Refused(f"{where} is on no link on which neighbours ask for it")
    if not held.is_lasting:
        raise Refused(f"{where} ends by itself: DHCP or router advertisements gave it, and would give it again",
                      hint="an address that was configured")
    if not held.is_in_use:
        raise Refused(f"{where} is not in use: whether another host has it is not known yet, or another has it")
    return held


def _refuse_needed(held: Held, reached_at: IPAddress | None) -> None:
    """Refused where this host would lose more than the address."""
    address = held.what.address
    others = [one for one in addresses.held(address.version)
              if one.interface == held.interface and one.what.address != address]
    if not any(address in one.what.network for one in others):
        raise Refused(f"{address} is the only address of {held.name} in its network, whose routes would go with it",
                      hint="move an address beside the host's own")
    if not held.is_secondary and any(one.is_secondary and one.what.network == held.what.network for one in others):
        raise Refused(f"{address} is the primary address of {held.name}: the others of {held.what.network} depend on "
                      "it", hint="move an address beside the host's own")
    routes = addresses.preferring(address)
    if routes:
        raise Refused(f"{address} is the source that the route to {routes[0]} names, which would go with it",
                      hint="give that route another source")
    if reached_at is not None:
        with contextlib.suppress(KernelError):
            if routing.source_towards(reached_at) == address:
                raise Refused(f"{address} is the address from which this host speaks to the destination by SSH",
                              hint="`ip route ... src` with another of its addresses")
    for use in sockdiag.uses_of(address):
        if use.peer is not None and use.inode and _is_sshd(use.inode):
            raise Refused(f"{address} is the address at which this host is reached by SSH now ({use})",
                          hint="log in at another of its addresses")


def _is_sshd(inode: int) -> bool:
    """OpenSSH's processes are sshd, and sshd-session since 9.8."""
    for pid in process.holders({inode})[inode]:
        with contextlib.suppress(TcpcpError):
            if process.name(pid).startswith("sshd"):
                return True
    return False


def _refuse_left_behind(flow: Flow, plan: Plan) -> None:
    """Refused where sockets of this host would lose their address, or what was passed to others its way."""
    if plan.leave_behind:
        return
    address = flow.local.address
    uses = [use for use in sockdiag.uses_of(address)
            if (use.protocol, use.local, use.peer) != (flow.protocol, flow.local, flow.peer)]
    with host_rules(flow.ip_version, flow.protocol) as rules:
        elsewhere = [one for one in rules.moved_elsewhere(address, plan.nexthop, plan.interface)
                     if one.plain != flow.plain]
    left = [*map(str, uses), *(f"{one} (passed to another host)" for one in elsewhere)]
    if left:
        more = f", and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        raise Refused(f"{len(left)} that use {address} would stay behind without it: {'; '.join(left[:_NAMED])}{more}",
                      hint="pass them first, by --redirect forward, and end the listeners; or --leave-behind")


# -- the destination's half --------------------------------------------------------------------------------------------

def answer(message: Adopt, flow: Flow, journal: Journal, admit: Callable[[IPAddress, bool], None] | None) -> Message:
    """What the destination says to it, in the network namespace of its side of the pass; `now`, it has the address
    where that is Adopted, and has not where it is Refused. `admit`: a guarded door says whether it may be,
    and if it is to be now."""
    try:
        what = InterfaceAddress.from_json(message.address)
        if what.address != flow.local.address:
            raise ProtocolError(f"{what.address} is not the address of the pass's connection")
        if message.now:
            _refuse_stale(journal)
            if routing.is_local(what.address):  # asked again
                return Adopted(message.pass_id, _announced(what.address))
        if admit is not None:
            admit(what.address, message.now)
        interface = _interface_for(what.address)
        if message.now:
            return Adopted(message.pass_id, _adopt(what, interface, journal))
        _refuse_another_link(what.address, interface, message.hardware)
    except TcpcpError as error:
        if message.now and journal.exists():
            journal.write(ADDRESS, phase=_REFUSED)
        return RefusedMessage(message.pass_id, error.message, error.hint)
    return Adopted(message.pass_id)


def _refuse_stale(journal: Journal) -> None:
    """What was refused once is at the origin again, for good; what was here and is not has gone its way since: a word
    that comes so late, by a link that had stalled, moves nothing."""
    standing = journal.field(ADDRESS)
    if standing is None or standing["boot"] != boot_id():
        return
    if standing["phase"] == _REFUSED:
        raise Refused("the destination has refused it before")
    if not routing.is_local(Held.from_json(standing["held"]).what.address):
        raise Refused("the destination had it, and has it no more")


def _interface_for(address: IPAddress) -> int:
    """On whose link it is."""
    if routing.is_local(address):
        raise Refused(f"the destination has {address} already")
    nowhere = f"the destination has no interface on the link of {address}"
    hint = "--redirect forward, or hook:CMD where a router has to be told"
    try:
        hop = routing.way_to(address)
    except KernelError as error:
        raise Refused(f"{nowhere}: {error.message}", hint=hint) from None
    if hop.gateway is not None or not hop.interface:
        raise Refused(f"{nowhere}: it is behind the gateway {hop.gateway}", hint=hint)
    if not addresses.hardware(hop.interface):
        raise Refused(f"{nowhere}: its way there is no Ethernet", hint=hint)
    return hop.interface


def _refuse_another_link(address: IPAddress, interface: int, hardware: str) -> None:
    found = neighbours.hardware_of(address, interface, _NEIGHBOUR_S)
    if found.lower() != hardware.lower():
        who = f"{found} answers for it" if found else "nobody answers for it"
        raise Refused(f"the destination is not on the link of {address}: there, {who}, and not {hardware}",
                      hint="--redirect forward, or hook:CMD where a router has to be told")


def _adopt(what: InterfaceAddress, interface: int, journal: Journal) -> str:
    """Have it; returns what could not be done. Refused where the pass was not committed here."""
    if journal.verdict() != "committed":
        raise Refused("the destination has not committed the pass")
    faults = Faults()
    faults.stop("destination:add address")
    try:
        faults.fail("destination:add address")
        for other in all_journals():  # it comes back: what had sent it away has had its end
            if is_under_way(other) and Held.from_json(_standing(other)["held"]).what.address == what.address:
                _settle(other, _MOVED)
        addresses.add(what, interface)
        journal.write(ADDRESS, phase=_ADOPTED, held=Held(what, interface, "").to_json())
    except TcpcpError:
        addresses.remove(what, interface)
        raise
    faults.stop("destination:announce address")
    return _announced(what.address)


def _standing(journal: Journal) -> dict[str, Any]:
    return journal.field(ADDRESS) or {}


def _announced(address: IPAddress) -> str:
    """Tell the link; returns why not, for it is here all the same."""
    try:
        announce(address)
    except TcpcpError as error:
        return f"{address} has moved, and its neighbours were not told: {error.message}"
    return ""


def announce(address: IPAddress) -> None:
    """Of an address that this host has."""
    for one in addresses.held(address.version):
        if one.what.address == address:
            neighbours.announce(address, one.interface, addresses.hardware(one.interface))
