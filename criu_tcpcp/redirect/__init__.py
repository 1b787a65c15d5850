"""How later packets of a passed connection reach the destination: one file a strategy, one interface.

A strategy has a half at each host. At both, `stage` does everything slow and refuses what cannot work, before anything
is stopped; `commit` is one cheap step within the freeze; `undo` takes back what stage (and commit) did. The origin's
half says in `held_packets_follow` whether what was held can be released to the new owner.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ..core.endpoint import Flow, IPAddress
from ..core.errors import ProtocolError, Refused
from ..kernel import routing
from ..kernel.rules import HostRules


@dataclass(frozen=True)
class Plan:
    """What the journal remembers, so that a pass in doubt can be settled: strategy, why it was chosen, next hop."""

    strategy: str
    reason: str
    nexthop: IPAddress | None
    interface: int

    def to_json(self) -> dict[str, Any]:
        return {"strategy": self.strategy, "reason": self.reason, "interface": self.interface,
                "nexthop": str(self.nexthop) if self.nexthop else None}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        try:
            nexthop = ipaddress.ip_address(value["nexthop"]) if value["nexthop"] else None
            return cls(str(value["strategy"]), str(value["reason"]), nexthop, int(value["interface"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"not a redirect plan: {error}") from None


class OriginRedirect(Protocol):
    """The origin's half. All calls are made in the origin process's network namespace."""

    held_packets_follow: bool

    def stage(self, rules: HostRules, flow: Flow) -> None: ...
    def commit(self, rules: HostRules, flow: Flow) -> None: ...
    def undo(self, rules: HostRules, flow: Flow) -> None: ...


def choose(wanted: str, flow: Flow, via: IPAddress, address_is_local: bool) -> Plan:
    """`auto`: none where the destination has the address already, else forward to a next hop on the same link. Refused
    says what stands in the way; nothing is touched. `via`: the address at which the destination takes the packets."""
    hop = routing.way_to(via) if via.version == flow.ip_version else None
    on_link = hop is not None and hop.gateway is None and not hop.local
    nexthop, interface = (via, hop.interface) if hop is not None and on_link else (None, 0)
    if wanted == "auto":
        wanted = "none" if address_is_local else "forward"
        why = (f"{flow.local.address} is an address of the destination" if address_is_local
               else f"{via} is on the same link")
    else:
        why = "as asked"
    if wanted == "none":
        if not address_is_local:
            raise Refused(f"--redirect none: {flow.local.address} is not an address of the destination",
                          hint="leave --redirect away, or give the destination that address first")
        return Plan("none", why, nexthop, interface)
    if hop is None:
        raise Refused(f"the connection is IPv{flow.ip_version}, but the destination was reached at {via}",
                      hint="name its other address with --via")
    if not on_link:
        via_text = "this host itself" if hop.local else f"behind the gateway {hop.gateway}"
        raise Refused(f"--redirect forward needs the destination on the same link, and {via} is {via_text}",
                      hint="name an address on a common link with --via")
    return Plan("forward", why, nexthop, interface)


def origin_half(plan: Plan) -> OriginRedirect:
    """The strategy of a plan."""
    from .forward import ForwardAtOrigin
    from .none import NoneAtOrigin
    halves: dict[str, Callable[[Plan], OriginRedirect]] = {"none": NoneAtOrigin, "forward": ForwardAtOrigin}
    if plan.strategy not in halves:
        raise Refused(f"--redirect {plan.strategy} is not known", hint=f"one of auto, {', '.join(halves)}")
    return halves[plan.strategy](plan)
