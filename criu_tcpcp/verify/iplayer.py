"""Assertion 8: what the IP header shows stays as it was. The first ordinary packet is the measure."""

from __future__ import annotations

from collections.abc import Iterator

from .judgement import Expectations, PassedAssertion, Violation
from .packet import CWR, ECE, Packet, Role
from .wire import Step, Wire

_NOT_ECT_RUN = 3


class Constants(PassedAssertion):
    """8. TTL or hop limit (at equal hop count, else per host), DSCP and DF constant; ECN consistent.

    ECN (RFC 3168 6.1): if it was not negotiated, neither ECN field nor ECE or CWR appear; if it was, new data is sent
    ECN-capable. Retransmissions and pure acknowledgements are not (6.1.4, 6.1.5), and after a loss a retransmission
    may look new here, so only three new segments in a row without ECT are a violation."""

    number = 8

    def __init__(self, expect: Expectations, ecn: bool | None) -> None:
        super().__init__(expect)
        self._ecn = ecn
        self._first: Packet | None = None
        self._ttl: dict[Role, int] = {}
        self._bare = 0
        if ecn is None:
            self.not_checked.append("8: ECN: whether it was negotiated is not known")
        if not expect.equal_hops:
            self.not_checked.append("8: the TTL between the hosts (they are not equally far)")

    def judge(self, step: Step, wire: Wire) -> Iterator[Violation]:
        packet = step.packet
        if self._first is None:
            self._first = packet
        first = self._first
        ttl = self._ttl.setdefault(Role.UNKNOWN if self.expect.equal_hops else step.host, packet.ttl)
        if packet.ttl != ttl:
            yield self.fail(f"TTL {packet.ttl}, was {ttl}", packet)
        if packet.tos >> 2 != first.tos >> 2:
            yield self.fail(f"DSCP {packet.tos >> 2}, was {first.tos >> 2}", packet)
        if packet.df != first.df:
            yield self.fail(f"DF {int(packet.df)}, was {int(first.df)}", packet)
        if self._ecn is False:
            yield from self._without_ecn(packet)
        elif self._ecn:
            yield from self._with_ecn(step, wire)

    def _without_ecn(self, packet: Packet) -> Iterator[Violation]:
        if packet.ecn or packet.flags & (ECE | CWR):
            yield self.fail(f"ECN field {packet.ecn}, flags {packet.flags:#x}, though ECN was not negotiated", packet)

    def _with_ecn(self, step: Step, wire: Wire) -> Iterator[Violation]:
        sent = wire.passed.sent_end
        if not step.packet.payload_len or step.probe or (sent is not None and step.start < sent):
            return
        self._bare = self._bare + 1 if step.packet.ecn == 0 else 0
        if self._bare == _NOT_ECT_RUN:
            yield self.fail(f"{_NOT_ECT_RUN} new segments in a row are not ECN-capable, though ECN was negotiated",
                            step.packet)
