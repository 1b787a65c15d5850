"""`none`: the destination has the local address itself, and the network takes the packets there without us.

That is so when a connection is passed back to the host whose address it uses, and when an operator moves the address
or a balancer's entry. The origin host drops what still arrives; what was held is sent to the destination where that is
on a link of the origin's, else dropped too (the peer sends it again, one RTO later) and the report says so.
"""

from __future__ import annotations

from ..core.endpoint import Flow
from ..kernel.rules import HostRules
from . import OriginRedirect, Plan, Setting
from .forward import ForwardAtOrigin


class NoneAtOrigin(OriginRedirect):
    """With a next hop, late packets go there as in `forward`; without one the fence drops them."""

    def __init__(self, plan: Plan, setting: Setting) -> None:
        self._forward = ForwardAtOrigin(plan, setting) if plan.nexthop is not None else None
        self.held_packets_follow = self._forward is not None

    def stage(self, rules: HostRules, flow: Flow) -> None:
        if self._forward is not None:
            self._forward.stage(rules, flow)

    def commit(self, rules: HostRules, flow: Flow) -> None:
        if self._forward is not None:
            self._forward.commit(rules, flow)

    def undo(self, rules: HostRules, flow: Flow) -> None:
        if self._forward is not None:
            self._forward.undo(rules, flow)
