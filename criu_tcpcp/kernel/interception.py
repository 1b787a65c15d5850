"""What this host sends for one connection is caught before it leaves: seen, and dropped.

The table goes with its owner, whatever ends that. It stands in front of everything else of this tool, and in front of
connection tracking (priority -200), which so never hears of what did not leave.
"""

from __future__ import annotations

import os
import time

from ..core.endpoint import Flow, Protocol
from . import netlink, nftables
from .nfqueue import DROP, PacketQueue
from .nftables import OUTPUT, Chain, Component, Table
from .rawpacket import RST, SYN, Segment, headers
from .rules import TABLE

_PRIORITY = -301


class Interception:
    """Of one connection, from when it is made."""

    def __init__(self, flow: Flow) -> None:
        self._version = flow.ip_version
        self._queue = PacketQueue()
        self._wire = netlink.NetlinkSocket()
        try:
            self._install(flow)
        except BaseException:
            self.close()
            raise

    def _install(self, flow: Flow) -> None:
        table = Table(self._wire, f"{TABLE}_caught_{os.getpid()}_{self._wire.fileno()}", self._version)
        table.create(nftables.TABLE_OWNER)
        load = nftables.load_flow(self._version, Protocol.TCP, outgoing=True) + nftables.in_set("caught")
        ways = (nftables.queue_natively(self._queue.number), nftables.queue_by_xt(self._queue.number))
        table.install_first([Component(self._version, ("caught",), (Chain("caught", OUTPUT, _PRIORITY, (load + way,)),))
                             for way in ways])
        table.add("caught", [flow])

    def answer(self, timeout_s: float) -> tuple[int, int] | None:
        """(flags, sequence number) of the first segment with SYN or RST that this host sends; None where none comes in
        time."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            packet = self._queue.next_packet(left)
            if packet is None:
                return None
            segment = headers(packet, self._version)
            if segment is not None and segment.flags & (SYN | RST):
                return segment.flags, segment.sequence
        return None

    def taken(self) -> list[Segment]:
        """What was sent since, by its headers; never blocks."""
        packets = self._queue.take()
        self._queue.let_go((number for number, _packet in packets), DROP)
        found = (headers(packet, self._version) for _number, packet in packets)
        return [segment for segment in found if segment is not None]

    def close(self) -> None:
        self._wire.close()
        self._queue.close()
