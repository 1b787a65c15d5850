"""Made-up conversations, packet by packet, for those who judge captures.

`Talk` is a correct conversation: handshake, requests and answers, the passed end at the origin first and at the
destination after `move`. Sequence numbers and timestamps begin just below 2^32, so every test crosses the wrap.
"""

from __future__ import annotations

import ipaddress
from dataclasses import replace

from criu_tcpcp.core.endpoint import Endpoint, Flow
from criu_tcpcp.verify import Packet, Role, builder
from criu_tcpcp.verify.packet import ACK, CWR, ECE, PSH, SYN, Options

LOCAL = Endpoint(ipaddress.ip_address("10.0.0.1"), 80)
PEER = Endpoint(ipaddress.ip_address("10.0.0.9"), 5555)
FLOW = Flow(LOCAL, PEER)
MACS = {Role.PEER: b"\2\0\0\0\0\x09", Role.ORIGIN: b"\2\0\0\0\0\1", Role.DESTINATION: b"\2\0\0\0\0\2"}
MS = 1_000_000
SCALE = 7


class Talk:
    """Builds a conversation packet by packet. `at` is the passed end's host; both clocks tick in milliseconds."""

    def __init__(self, *, timestamps: bool = True, sack: bool = True, ecn: bool = False) -> None:
        self.packets: list[Packet] = []
        self.at = Role.ORIGIN
        self.now = 1_000_000_000_000
        self.timestamps, self.sack, self.ecn = timestamps, sack, ecn
        self.next = {True: 2**32 - 150, False: 2**32 - 50}       # by "from the peer"
        self.clock = {True: 2**32 - 2, False: 2**32 - 5}
        self.ticks = 0
        self.window = 1000
        bits = ECE | CWR if ecn else 0
        self.say(True, flags=SYN | bits, ack=0)
        self.say(False, flags=SYN | ACK | (ECE if ecn else 0))
        self.say(True)

    def say(self, from_peer: bool, payload: bytes = b"", flags: int = ACK, **changes: object) -> Packet:
        self.now += MS
        self.ticks += 1
        syn = bool(flags & SYN)
        tsval = (self.clock[from_peer] + self.ticks) % 2**32 if self.timestamps else None
        heard = next((packet.options.tsval for packet in reversed(self.packets)
                      if (packet.src == PEER) != from_peer), 0)
        options = Options(0, 1460 if syn else None, SCALE if syn else None, self.sack and syn, (), tsval,
                          None if tsval is None else heard)
        packet = Packet(
            time_ns=self.now, capture="peer", number=len(self.packets) + 1, ip_version=4,
            src=PEER if from_peer else LOCAL, dst=LOCAL if from_peer else PEER, seq=self.next[from_peer],
            ack=self.next[not from_peer], flags=flags, window=self.window, payload=payload, payload_len=len(payload),
            options=options, ttl=64, tos=2 if self.ecn and payload else 0, df=True,
            ether_src=MACS[Role.PEER if from_peer else self.at])
        self.next[from_peer] = (self.next[from_peer] + packet.sequence_length) % 2**32
        packet = replace(packet, **changes)     # type: ignore[arg-type]
        packet = replace(packet, options=replace(packet.options, length=len(builder.options(packet.options))))
        self.packets.append(packet)
        return packet

    def exchange(self, number: int = 3, request: int = 60, answer: int = 40) -> None:
        for index in range(number):
            self.say(True, bytes([index + 1]) * request, ACK | PSH)
            self.say(False, bytes([index + 101]) * answer, ACK | PSH)
            self.say(True)

    def move(self) -> None:
        self.at = Role.DESTINATION

    def ack(self, **changes: object) -> Packet:
        """An ordinary acknowledgement by the passed end, with changes."""
        return self.say(False, **changes)       # type: ignore[arg-type]

    def options(self, **changes: object) -> Packet:
        """An acknowledgement with changed options."""
        packet = self.ack()
        self.packets[-1] = replace(packet, options=replace(packet.options, **changes))  # type: ignore[arg-type]
        return self.packets[-1]


def passed(talk: Talk | None = None) -> Talk:
    """A talk that was passed and went on."""
    talk = Talk() if talk is None else talk
    talk.exchange()
    talk.move()
    talk.exchange()
    return talk
