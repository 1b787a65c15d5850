"""Captures -> verdict: which connection, which stream of packets is the truth, and the assertions run over it.

A packet that crossed several capture points is one packet. So nothing is counted over all files together:

- The *truth* is the peer's capture: what reached the peer and what it sent, in its order. All packet assertions, the
  counts and the stall come from it. Without one, the egress captures merged by time stand in.
- The *egress* captures, merged by time, show what left each host, also what got lost later: 1, 2, 3 and 6 are run
  over them again (their clocks are set by the peer's, `clocks`), and their bytes share one memory with the truth's, so
  that a byte that never arrived is compared too. What both streams object to is reported once.

Where the path may reorder (`Expectations.reorders`), the truth is what each end sent, as it was sent: the peer's
packets of its own capture and the passed end's of the egress captures, merged by time.

An egress capture must hold what its own host sends: where the destination's packets return through the origin, take
the origin's capture in the LINUX_SLL format (it tells incoming from outgoing), or give `Expectations.macs`.
A peer's packet that comes twice to the egress captures (held at the origin, forwarded to the destination) is harmless:
there, only the passed end is judged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.endpoint import Flow
from .application import PeerRecord, check_application
from .assertions import Acknowledgement, ControlFlags, OneOwner, RightEdge, SegmentSize, Timestamps
from .assertions import Sequence as SequenceNumbers
from .capture import Capture
from .clocks import aligned
from .connections import find_flow
from .counters import check_counters
from .iplayer import Constants
from .judgement import Assertion, Expectations, Turn, Violation
from .packet import RST, CaptureError, IcmpError, Packet, Role
from .seq import ByteStore
from .traffic import Counts, Retransmissions, Stall, StallMeter, Tally, order
from .wire import RECENT, RECENT_ON_LONG_PATHS, Identity, Negotiated, Wire, identity

_EGRESS = (Role.ORIGIN, Role.DESTINATION)


@dataclass(frozen=True)
class Verdict:
    """`ok`: nothing that was checked is violated. `not_checked` says what was not, and why; read both. `turns`: which
    host spoke for the passed end from when on, empty where that cannot be told."""

    flow: Flow
    violations: tuple[Violation, ...]
    not_checked: tuple[str, ...]
    counts: Counts
    stall: Stall
    negotiated: Negotiated
    turns: tuple[Turn, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.violations

    @property
    def stall_ns(self) -> int:
        """The longest gap that the peer saw: the larger of `Stall.answer_ns` and `Stall.silence_ns`."""
        return self.stall.longest_ns

    def to_json(self) -> dict[str, Any]:
        return {"flow": self.flow.to_json(), "ok": self.ok, "violations": [v.to_json() for v in self.violations],
                "not_checked": list(self.not_checked), "counts": self.counts.to_json(), "stall_ns": self.stall_ns,
                "stall_at_ns": self.stall.at_ns, "gap_ns": self.stall.gap_ns,
                "turns": [turn.to_json() for turn in self.turns]}


def verify(captures: Sequence[Capture], flow: Flow | None = None, expect: Expectations | None = None, *,
           counters: tuple[Mapping[str, int], Mapping[str, int]] | None = None, application: PeerRecord | None = None,
           stall_budget_ns: int | None = None) -> Verdict:
    """Judge one connection on `captures`. `flow` may be left out if they hold one connection only and show which end
    moved (`find_flow`). `counters`: the peer's, before and after. Raises CaptureError if there is nothing to judge."""
    expect = expect if expect is not None else Expectations()
    flow = flow if flow is not None else find_flow(captures)
    ends = {flow.local, flow.peer}
    mine = {id(capture): [packet for packet in capture.packets if {packet.src, packet.dst} == ends]
            for capture in captures}
    egress_captures = [capture for capture in captures if capture.role in _EGRESS and mine[id(capture)]]
    truth_captures = [capture for capture in captures if capture.role not in _EGRESS and mine[id(capture)]]
    at_peer = [capture for capture in truth_captures if capture.role is Role.PEER] or truth_captures
    if len(at_peer) > 1:
        raise CaptureError(f"{len(at_peer)} captures of {flow} claim to be the peer's: "
                           + ", ".join(capture.name for capture in at_peer))
    clocks: list[str] = []
    for capture in egress_captures if at_peer else ():
        mine[id(capture)], said = aligned(mine[id(capture)], mine[id(at_peer[0])], flow, capture.name)
        clocks += said
    egress = order([packet for capture in egress_captures for packet in mine[id(capture)]
                    if packet.outgoing is not False or packet.src == flow.peer])
    truth = order(mine[id(at_peer[0])]) if at_peer else egress
    if expect.reorders:
        truth = _as_sent(flow, [mine[id(capture)] for capture in at_peer], egress)
    if not truth:
        raise CaptureError(f"no packet of {flow} in the captures")

    hosts = _hosts(flow, truth if at_peer else [], egress_captures, mine, expect)
    roles = {capture.name: capture.role for capture in captures}
    judge = _Judge(flow, expect, hosts, roles, truth, {capture.role for capture in captures} & set(_EGRESS),
                   _senders(flow, egress, roles))
    judge.run_truth(truth, strict=expect.loss_free or expect.reorders or not at_peer)
    if at_peer and egress:
        judge.run_egress(egress)
    judge.finish(captures, at_peer=bool(at_peer))
    violations, not_checked = judge.violations, judge.not_checked + clocks
    if counters is not None:
        violations += check_counters(*counters)
    else:
        not_checked.append("9: the peer's kernel counters: not given")
    if application is not None:
        violations += check_application(application, stall_budget_ns)
    else:
        not_checked.append("10: the peer's application: no report given")
    violations.sort(key=lambda violation: violation.packet.time_ns if violation.packet is not None else 1 << 80)
    return Verdict(flow, tuple(violations), tuple(dict.fromkeys(not_checked)), judge.tally.result(),
                   judge.meter.result(), judge.negotiated, tuple(judge.turns))


class _Judge:
    """One run of `verify`: collects violations of the truth and the egress stream, each once."""

    def __init__(self, flow: Flow, expect: Expectations, hosts: Mapping[bytes, Role], roles: Mapping[str, Role],
                 truth: list[Packet], egress: set[Role], senders: Mapping[Identity, Role]) -> None:
        self.flow, self.expect, self.hosts, self.roles, self.senders = flow, expect, hosts, roles, senders
        self.violations: list[Violation] = []
        self.not_checked: list[str] = []
        self.tally = Tally()
        self.meter = StallMeter()
        self.store = ByteStore()
        self.hosts_told = egress >= set(_EGRESS)
        self.turns: list[Turn] = []
        self.negotiated = expect.negotiated.or_else(_handshake(self._wire(), truth))

    def _wire(self) -> Wire:
        return Wire(self.flow, self.hosts, self.roles, self.senders,
                    RECENT_ON_LONG_PATHS if self.expect.reorders else RECENT)

    def run_truth(self, packets: Iterable[Packet], strict: bool) -> None:
        expect, negotiated = self.expect, self.negotiated
        owner = OneOwner(expect)
        rules: list[Assertion] = [
            ControlFlags(expect), owner, SequenceNumbers(expect, self.store, strict), Acknowledgement(expect),
            RightEdge(expect, negotiated.window_scale), Timestamps(expect, negotiated.timestamps),
            SegmentSize(expect, negotiated), Constants(expect, negotiated.ecn),
            Retransmissions(expect, self.tally.counts)]
        wire = self._wire()
        for packet in packets:
            step = wire.step(packet)
            for rule in rules:
                self.violations += rule.see(step, wire)
            self.meter.see(step, wire)
            self.tally.see(step, wire.advance(step))
        self._end(rules, wire)
        self.peer_tsvals = frozenset(wire.peer.tsvals)
        self._note_owner(owner)

    def run_egress(self, packets: Iterable[Packet]) -> None:
        known = {_key(violation) for violation in self.violations}
        before, self.violations = self.violations, []
        owner = OneOwner(self.expect)
        rules: list[Assertion] = [
            ControlFlags(self.expect), owner, SequenceNumbers(self.expect, self.store, strict=True),
            Timestamps(self.expect, self.negotiated.timestamps, self.peer_tsvals)]
        wire = self._wire()
        for packet in packets:
            step = wire.step(packet)
            for rule in rules:
                self.violations += rule.see(step, wire)
            wire.advance(step)
        self._end(rules, wire)
        self._note_owner(owner)
        self.violations = before + [violation for violation in self.violations if _key(violation) not in known]

    def _note_owner(self, owner: OneOwner) -> None:
        self.hosts_told = self.hosts_told or owner.seen >= set(_EGRESS)
        if self.hosts_told and owner.turns:
            self.turns = owner.turns

    def _end(self, rules: Iterable[Assertion], wire: Wire) -> None:
        for rule in rules:
            self.violations += rule.end(wire)
            self.not_checked += rule.not_checked

    def finish(self, captures: Iterable[Capture], at_peer: bool) -> None:
        if not self.hosts_told:
            self.not_checked.append("2: which host sent which packet cannot be told (one Ethernet source, and not both "
                                    "egress captures)")
        if not at_peer:
            self.not_checked.append("no capture at the peer: what left the hosts stands for what reached the peer; "
                                    "the counts of its retransmissions and the stall are approximate")
        ends = {self.flow.local, self.flow.peer}
        errors: dict[tuple[int, int, str], IcmpError] = {}
        for capture in captures:
            for error in capture.icmp:
                if {error.quoted_src, error.quoted_dst} == ends:
                    errors.setdefault((error.kind, error.code, error.sender), error)
            if capture.fragments or capture.damaged:
                self.not_checked.append(f"{capture.name}: {capture.fragments} later fragments, {capture.damaged} "
                                        "damaged frames: of unknown connections")
            if capture.untimed:
                self.not_checked.append(f"{capture.name}: {capture.untimed} packets were captured without their time")
        self.violations += [Violation(1, f"ICMP type {error.kind} code {error.code} about the connection from "
                                         f"{error.sender}", error) for error in errors.values()]


def _key(violation: Violation) -> tuple[Any, ...]:
    """Equal for one packet seen at two capture points."""
    packet = violation.packet
    if not isinstance(packet, Packet):
        return (violation.assertion, violation.reason)
    return (violation.assertion, packet.src, packet.seq, packet.ack, packet.flags, packet.options.tsval)


def _as_sent(flow: Flow, at_peer: list[list[Packet]], egress: list[Packet]) -> list[Packet]:
    if not at_peer or not egress:
        raise CaptureError("on a path that reorders, captures at the peer and at the hosts are needed")
    return order([*(packet for packet in at_peer[0] if packet.src == flow.peer),
                  *(packet for packet in egress if packet.src == flow.local)])


def _handshake(wire: Wire, packets: Iterable[Packet]) -> Negotiated:
    """What the SYNs say. Without them, the peer's first packet still tells whether timestamps were negotiated: then
    every segment has them (RFC 7323 3.2)."""
    later = Negotiated()
    for packet in packets:
        step = wire.step(packet)
        if step.handshake:
            wire.advance(step)
        elif step.from_peer and not packet.flags & RST:
            later = Negotiated(timestamps=packet.options.tsval is not None)
            break
    return wire.negotiated().or_else(later)


def _senders(flow: Flow, egress: Iterable[Packet], roles: Mapping[str, Role]) -> dict[Identity, Role]:
    """Which host sent each packet of the passed end, by the egress captures; what both sent alike is left out."""
    found: dict[Identity, Role] = {}
    for packet in egress:
        if packet.src == flow.local:
            role = roles[packet.capture]
            known = found.setdefault(identity(packet), role)
            if known is not role:
                found[identity(packet)] = Role.UNKNOWN
    return found


def _hosts(flow: Flow, truth: Sequence[Packet], egress: Iterable[Capture], mine: Mapping[int, list[Packet]],
           expect: Expectations) -> dict[bytes, Role]:
    """Which Ethernet source is which host at the peer. The caller's word first; then a source that one egress capture
    alone sends from; then, if exactly two sources occur, the first is the origin. One source (a router's, or one
    host's): nothing is claimed."""
    sources = list(dict.fromkeys(packet.ether_src for packet in truth
                                 if packet.src == flow.local and packet.ether_src is not None))
    if expect.macs:
        return dict(expect.macs)
    claims: defaultdict[bytes, set[Role]] = defaultdict(set)
    for capture in egress:
        for packet in mine[id(capture)]:
            if packet.src == flow.local and packet.ether_src is not None and packet.outgoing is not False:
                claims[packet.ether_src].add(capture.role)
    known = {source: next(iter(claims[source])) for source in sources if len(claims[source]) == 1}
    if len(set(known.values())) == 2 or len(sources) != 2:
        return known
    return {sources[0]: Role.ORIGIN, sources[1]: Role.DESTINATION}
