"""What every assertion shares: its name, the violation that it yields, and what the caller expects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .packet import RST, SYN, IcmpError, Packet, Role
from .wire import Negotiated, Step, Wire

NAMES = {
    1: "no RST, SYN, unasked FIN or ICMP", 2: "origin silent after the destination's first packet",
    3: "sequence numbers and bytes", 4: "acknowledgements", 5: "the window's right edge", 6: "timestamps",
    7: "MSS and SACK", 8: "TTL, DSCP, DF, ECN", 9: "kernel counters and retransmissions", 10: "the peer's application",
}


@dataclass(frozen=True)
class Violation:
    """What contradicts assertion `assertion`; `reason` holds the numbers."""

    assertion: int
    reason: str
    packet: Packet | IcmpError | None = None

    @property
    def name(self) -> str:
        return NAMES[self.assertion]

    def __str__(self) -> str:
        where = f" [{self.packet}]" if self.packet is not None else ""
        return f"assertion {self.assertion} ({self.name}): {self.reason}{where}"

    def to_json(self) -> dict[str, Any]:
        packet = self.packet
        return {"assertion": self.assertion, "name": self.name, "reason": self.reason,
                "packet": str(packet) if packet is not None else None,
                "capture": packet.capture if packet is not None else None,
                "number": packet.number if packet is not None else None,
                "time_ns": packet.time_ns if packet is not None else None,
                "seq": packet.seq if isinstance(packet, Packet) else None}


@dataclass(frozen=True)
class Turn:
    """From `packet` on, `host` spoke for the passed end."""

    host: Role
    packet: Packet

    def to_json(self) -> dict[str, Any]:
        return {"host": str(self.host), "capture": self.packet.capture, "number": self.packet.number,
                "time_ns": self.packet.time_ns}


@dataclass(frozen=True)
class Expectations:
    """What the caller knows and the packets do not say.

    `negotiated` supplements the handshake; `offload`: captures were taken on hosts, before segmentation or after
    coalescing, so a payload above the MSS may be several segments; `loss_free`: the path loses and reorders nothing,
    which makes every retransmission and every gap a violation; `fin_passed`, `fin_peer`: did the application of that
    end ask for a FIN (None: not told); `equal_hops`: both hosts are as far from the peer, so the TTL must not change;
    `macs`: Ethernet source -> host, as the peer's capture sees them; `jiffy_ns`: of the kernels concerned; `passes`:
    how often the connection was passed, there and back in turn; `reorders`: the path may change the order of packets,
    so what each end sent is judged as it left that end's hosts, which needs captures at all of them, by one clock."""

    negotiated: Negotiated = field(default_factory=Negotiated)
    offload: bool = True
    loss_free: bool = False
    fin_passed: bool | None = None
    fin_peer: bool | None = None
    equal_hops: bool = True
    macs: dict[bytes, Role] = field(default_factory=dict)
    jiffy_ns: int = 4_000_000
    passes: int = 1
    reorders: bool = False


class Assertion:
    """Base: sees everything, objects to nothing."""

    number = 0

    def __init__(self, expect: Expectations) -> None:
        self.expect = expect
        self.not_checked: list[str] = []

    def see(self, step: Step, wire: Wire) -> Iterator[Violation]:
        yield from ()

    def end(self, wire: Wire) -> Iterator[Violation]:
        yield from ()

    def fail(self, reason: str, packet: Packet | None = None) -> Violation:
        return Violation(self.number, reason, packet)


class PassedAssertion(Assertion):
    """Base of those that judge the passed end's ordinary packets only: no RST, and no SYN at all."""

    def see(self, step: Step, wire: Wire) -> Iterator[Violation]:
        if not step.from_peer and not step.packet.flags & (RST | SYN):
            yield from self.judge(step, wire)

    def judge(self, step: Step, wire: Wire) -> Iterator[Violation]:
        raise NotImplementedError
