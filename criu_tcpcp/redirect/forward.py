"""`forward`: the origin host sends the connection's packets on to the destination, a next hop on one of its links.

    peer --> gateway --> origin host                          destination host
                         @moved: dup to NEXTHOP, drop  -----> @diverted: mark -> local socket (transparent)
    peer <-- gateway <------------------------------------------ replies go directly

The packets themselves are unchanged (but for the TTL, one less): the destination serves an address that it does not
own and never answers ARP or neighbour solicitation for. Its half needs no strategy: where the local address is not its
own, `DivertAtDestination` is staged. ICMP errors about the connection still go to the address's owner.
"""

from __future__ import annotations

import contextlib

from ..core.endpoint import Flow
from ..core.errors import Refused
from ..journal import structure_lock
from ..kernel import routing
from ..kernel.rules import HostRules
from ..tracking import Tracked
from . import OriginRedirect, Plan, Setting


class ForwardAtOrigin(OriginRedirect):
    """One element in the set of the next hop; later packets, and those that were held, go there."""

    held_packets_follow = True

    def __init__(self, plan: Plan, _setting: Setting) -> None:
        if plan.nexthop is None:
            raise Refused("--redirect forward needs a next hop")
        self._nexthop, self._interface = plan.nexthop, plan.interface

    def stage(self, rules: HostRules, flow: Flow) -> None:
        """A firewall here sees of the connection only what is sent on, from the pass on, and may take none of it for
        invalid."""
        rules.prepare_move(self._nexthop, self._interface)
        if rules.is_tracking():
            with contextlib.closing(Tracked(flow, "this host")) as tracked:
                tracked.enter()

    def commit(self, rules: HostRules, flow: Flow) -> None:
        """From here on nothing of the connection reaches this host's stack."""
        rules.move(flow, self._nexthop, self._interface)

    def undo(self, rules: HostRules, flow: Flow) -> None:
        rules.stay(flow)


class DivertAtDestination:
    """The transparent divert (kernel/rules.py, kernel/routing.py), per connection."""

    def stage(self, rules: HostRules, flow: Flow) -> None:
        with structure_lock():
            rules.divert(flow)
            routing.add_divert(flow.local.address)

    def undo(self, rules: HostRules, flow: Flow) -> None:
        with structure_lock():
            if rules.undivert(flow):
                routing.sweep_diverts(flow.ip_version, rules.diverted_addresses())
