"""What leads the packets until the network takes them by itself: a base of strategies that need time for that."""

from __future__ import annotations

from ..core.endpoint import Flow
from ..kernel.rules import HostRules
from . import OriginRedirect, Plan, Setting
from .none import NoneAtOrigin


class Bridged(OriginRedirect):
    """The origin host sends the packets on, as by `forward`, or as by `none` where the destination has the address."""

    def __init__(self, plan: Plan, setting: Setting) -> None:
        self._bridge = NoneAtOrigin(plan, setting)
        self.held_packets_follow = self._bridge.held_packets_follow

    def stage(self, rules: HostRules, flow: Flow) -> None:
        self._bridge.stage(rules, flow)

    def commit(self, rules: HostRules, flow: Flow) -> None:
        self._bridge.commit(rules, flow)

    def undo(self, rules: HostRules, flow: Flow) -> None:
        self._bridge.undo(rules, flow)
