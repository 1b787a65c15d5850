"""How later packets of a passed connection reach the destination: one file a strategy, one interface.

A strategy has a half at each host. At both, `stage` does everything slow and refuses what cannot work, before anything
is stopped; `commit` is one cheap step within the freeze; `undo` takes back, as quickly, what both did. The half at the
origin says in `held_packets_follow` whether what was held can be released to the new owner, and has steps that may take
their time, for a network that is told of the pass: `announce`, `reroute`, `withdraw`, `forget`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..core.endpoint import Flow, IPAddress
from ..core.errors import ProtocolError, Refused, UsageError
from ..kernel import routing
from ..kernel.rules import HostRules
from ..kernel.tunnel import Tunnel

if TYPE_CHECKING:
    from .address import Reach

CARRY = "carry"
_HOOK = "hook:"


@dataclass(frozen=True)
class Plan:
    """What the journal remembers, so that a pass in doubt can be settled. `reason`: why the strategy was chosen; `via`:
    the destination's address for packets; `nexthop`: that address where it is on a link of this host, else the other
    end of a tunnel there, and then `source` is this host's address on the way; `command`: of a hook, its words;
    `leave_behind`: the address moves whatever of this host uses it. `back`: where what the destination says comes back
    (returned.py), this host's own next hop to the peer."""

    strategy: str
    reason: str
    nexthop: IPAddress | None
    interface: int
    via: str = ""
    command: tuple[str, ...] = ()
    source: str = ""
    leave_behind: bool = False
    back: IPAddress | None = None
    back_interface: int = 0

    @property
    def tunnel(self) -> Tunnel | None:
        return Tunnel(ipaddress.ip_address(self.source), ipaddress.ip_address(self.via)) if self.source else None

    def to_json(self) -> dict[str, Any]:
        return {"strategy": self.strategy, "reason": self.reason, "interface": self.interface,
                "nexthop": str(self.nexthop) if self.nexthop else None, "via": self.via, "command": list(self.command),
                "source": self.source, "leave_behind": self.leave_behind,
                "back": str(self.back) if self.back else None, "back_interface": self.back_interface}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        try:
            nexthop = ipaddress.ip_address(value["nexthop"]) if value["nexthop"] else None
            back = ipaddress.ip_address(value["back"]) if value["back"] else None
            return cls(str(value["strategy"]), str(value["reason"]), nexthop, int(value["interface"]),
                       str(value["via"]), tuple(map(str, value["command"])), str(value["source"]),
                       bool(value["leave_behind"]), back, int(value["back_interface"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"not a redirect plan: {error}") from None


@dataclass(frozen=True)
class Setting:
    """Of which pass a plan is: its id, and the destination host's own name. `with_reach`: how to speak with that host,
    where somebody can."""

    pass_id: str
    destination: str
    with_reach: Reach | None = None

    @property
    def reach(self) -> Reach:
        if self.with_reach is None:
            raise Refused("the destination cannot be spoken with from here")
        return self.with_reach


class OriginRedirect:
    """The origin's half. `stage`, `commit` and `undo` are called in the origin process's network namespace; the others,
    which most strategies do not need, in that of the command, whenever nothing waits for them."""

    held_packets_follow: bool

    def stage(self, rules: HostRules, flow: Flow) -> None:
        raise NotImplementedError

    def commit(self, rules: HostRules, flow: Flow) -> None:
        raise NotImplementedError

    def undo(self, rules: HostRules, flow: Flow) -> None:
        raise NotImplementedError

    def announce(self, flow: Flow) -> None:
        """A pass is about to begin. Refused: nothing was touched."""

    def reroute(self, flow: Flow) -> None:
        """The destination serves the peer: what has time has it now."""

    def withdraw(self, flow: Flow) -> None:
        """The pass that was announced has been undone."""

    def forget(self, flow: Flow) -> None:
        """The connection has ended, and its rules were released."""


def check_name(wanted: str) -> None:
    """UsageError for what is no `--redirect` of any pass."""
    if wanted not in ("auto", "none", "forward", CARRY, "address") and not wanted.startswith(_HOOK):
        raise UsageError(f"--redirect {wanted[:80]!r} is not known",
                         hint="one of auto, none, forward, carry, address, hook:CMD")


def choose(wanted: str, flow: Flow, via: IPAddress, address_is_local: bool, leave_behind: bool = False) -> Plan:
    """`auto`: none where the destination has the address already, else forward to a next hop on the same link, or a
    tunnel's other end; a hook is bridged by the one or the other, and a move of the address by forward. (`carry`, the
    last that is tried, asks for nothing: redirect/carry.py.) Refused says what stands in the way; nothing is touched.
    `via`: the address at which the destination takes the packets."""
    from . import hook
    check_name(wanted)
    if wanted.startswith(_HOOK):
        words = hook.words_of(wanted.removeprefix(_HOOK))
        bridge = choose("none" if address_is_local else "forward", flow, via, address_is_local)
        return replace(bridge, strategy="hook", reason=f"{words[0]}, bridged by {bridge.strategy}", command=words)
    if wanted == "address":
        if address_is_local:
            return replace(choose("none", flow, via, address_is_local),
                           reason=f"{flow.local.address} is an address of the destination already")
        bridge = choose("forward", flow, via, address_is_local)
        return replace(bridge, strategy="address", leave_behind=leave_behind,
                       reason=f"{flow.local.address} moves there, bridged by forward")
    way = _way(flow, via)
    if wanted == "auto":
        wanted = "none" if address_is_local else "forward"
        why = (f"{flow.local.address} is an address of the destination" if address_is_local else way.description)
    else:
        why = "as asked" if wanted == "none" or not way.source else f"as asked, {way.description}"
    if wanted == "none" and not address_is_local:
        raise Refused(f"--redirect none: {flow.local.address} is not an address of the destination",
                      hint="leave --redirect away, or give the destination that address first")
    if wanted == "forward" and way.nexthop is None:
        raise Refused(f"the connection's packets cannot be sent on to {via}, which is {way.description}",
                      hint="name another address of the destination with --via")
    return Plan(wanted, why, way.nexthop, way.interface, str(via), source=way.source)


@dataclass(frozen=True)
class _Way:
    """From this host to the destination. `source`: of a tunnel there, this end's address; it has no `interface` yet."""

    description: str
    nexthop: IPAddress | None = None
    interface: int = 0
    source: str = ""


def _way(flow: Flow, via: IPAddress) -> _Way:
    hop = routing.way_to(via)
    if hop.local:
        return _Way("this host itself")
    if hop.gateway is None and via.version == flow.ip_version:
        return _Way(f"{via} is on the same link", via, hop.interface)
    source = routing.source_towards(via)
    where = f"behind the gateway {hop.gateway}" if hop.gateway is not None else f"IPv{via.version}"
    return _Way(f"by a tunnel: {via} is {where}", Tunnel(source, via).next_hop(flow.ip_version), source=str(source))


def origin_half(plan: Plan, setting: Setting) -> OriginRedirect:
    """The strategy of a plan."""
    from .address import AddressAtOrigin
    from .forward import ForwardAtOrigin
    from .hook import HookAtOrigin
    from .none import NoneAtOrigin
    halves: dict[str, Callable[[Plan, Setting], OriginRedirect]] = {
        "none": NoneAtOrigin, "forward": ForwardAtOrigin, CARRY: ForwardAtOrigin, "address": AddressAtOrigin,
        "hook": HookAtOrigin}
    if plan.strategy not in halves:
        raise ProtocolError(f"a plan to {plan.strategy!r}, which is no strategy")
    return halves[plan.strategy](plan, setting)
