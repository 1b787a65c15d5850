"""Where a connection ends in a capture."""

from __future__ import annotations

from dataclasses import replace

from criu_tcpcp import verify
from criu_tcpcp.core import tcp
from criu_tcpcp.core.endpoint import Flow
from criu_tcpcp.kernel.rawpacket import FIN


def until_closed(capture: verify.Capture, flow: Flow) -> verify.Capture:
    """As long as either end has something to hear. What a timer repeats at the last moment, or a network, is answered
    once more then, or comes to an end that is no more, which says so by RST, as any stack does (RFC 9293 3.10.7.1)."""
    fins: dict[bool, int] = {}
    acknowledged = {True: False, False: False}
    for number, packet in enumerate(capture.packets):
        if {packet.src, packet.dst} != {flow.local, flow.peer}:
            continue
        ours = packet.src == flow.local
        if packet.flags & FIN:
            fins[ours] = tcp.add(packet.seq, packet.payload_len + 1)
        if (not ours) not in fins:
            continue
        acknowledged[not ours] |= tcp.distance(packet.ack, fins[not ours]) >= 0
        if all(acknowledged.values()):
            return replace(capture, packets=capture.packets[:number + 1])
    return capture
