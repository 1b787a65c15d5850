"""The hosts' clocks against the peer's, by the packets that both captured: none arrives before it was sent.

    t_peer                 when the peer's capture saw it
    t_host + offset        when the host's did, by the peer's clock

What the passed end sent gives an upper bound, t_host + offset <= t_peer; what the peer sent gives a lower one. An
offset of 0 that keeps to both is taken: the clocks agree as far as can be told. Else the middle is, and said.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..core.endpoint import Endpoint, Flow
from .packet import Packet
from .wire import Identity, identity


def aligned(packets: list[Packet], truth: Iterable[Packet], flow: Flow, name: str) -> tuple[list[Packet], list[str]]:
    """The packets of an egress capture by the peer's clock, and what there is to say about it."""
    here, there = _seen_once(packets), _seen_once(truth)
    upper = [there[key] - time_ns for key, time_ns in here.items() if key in there and key[0] == flow.local]
    lower = [there[key] - time_ns for key, time_ns in here.items() if key in there and key[0] == flow.peer]
    highest, lowest = min(upper, default=None), max(lower, default=None)
    if (lowest is None or lowest <= 0) and (highest is None or highest >= 0):
        return packets, []
    bounds = [bound for bound in (lowest, highest) if bound is not None]
    offset = sum(bounds) // len(bounds)
    doubt = (f", to within {abs(bounds[0] - bounds[-1]) / 2e6:.3f} ms: who of both hosts spoke first is not told more "
             "exactly than that" if len(bounds) == 2 else ", as far as it can be told")
    said = f"{name}: its clock was corrected by {offset / 1e6:+.3f} ms{doubt}"
    return [replace(packet, time_ns=packet.time_ns + offset) for packet in packets], [said]


def _seen_once(packets: Iterable[Packet]) -> dict[tuple[Endpoint, Identity], int]:
    """When each packet was captured, (source, identity) -> time, but for those of which there are several alike."""
    found: dict[tuple[Endpoint, Identity], int] = {}
    again = set()
    for packet in packets:
        key = (packet.src, identity(packet))
        if key in found:
            again.add(key)
        found[key] = packet.time_ns
    return {key: time_ns for key, time_ns in found.items() if key not in again}
