"""A connection's entry in this host's connection tracking, made for a host that is to have it (kernel/conntrack.py).

Made while staging, since what is forged for a way in, and what a restored socket learns from, passes the firewall, too;
brought up to date as the connection comes alive; taken away with a pass that is undone, and by `release`.
"""

from __future__ import annotations

from .core.endpoint import Flow, Protocol
from .core.errors import KernelError, Refused
from .core.refusals import Refusal
from .kernel import conntrack


class Tracked:
    """Of one connection, at the `host`, as a sentence has it. `is_ours`: there was none before. Refused where it cannot
    be what it has to be: `translated`, or not; nothing is made yet. Where nothing is tracked here, it does nothing."""

    def __init__(self, flow: Flow, host: str, *, translated: bool = False) -> None:
        self._flow, self._host = flow, host
        self._table = conntrack.Tracking() if conntrack.is_at_work() else None
        self.is_ours = False
        if self._table is None:
            return
        try:
            entry = self._table.entry_of(flow)
        except KernelError as error:
            self._do_without(error)
            return
        self.is_ours = entry is None
        if entry is not None and entry.is_translated and not translated:
            self.close()
            raise Refused(f"a NAT of {host} translates {flow}: its packets would not fit the connection",
                          refusal=Refusal.NAT)

    def enter(self, fins: int = 0) -> None:
        """`fins`: how many of its two FINs were sent."""
        if self._table is None:
            return
        try:
            self._table.enter(self._flow, fins)
        except KernelError as error:
            self._do_without(error)

    def _do_without(self, error: KernelError) -> None:
        """A kernel without ctnetlink, or a full table. What is not strict takes the connection from its middle, once
        this host has spoken."""
        self.close()
        if self._flow.protocol is Protocol.TCP and conntrack.is_strict():
            raise Refused(f"the conntrack of {self._host} takes no connection whose beginning it has not seen, and "
                          f"none can be entered: {error.message}", refusal=Refusal.CONNTRACK,
                          hint="there: sysctl net.netfilter.nf_conntrack_tcp_loose=1")

    def close(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None
