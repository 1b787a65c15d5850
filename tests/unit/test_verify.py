"""The assertions on made-up conversations: each must find the one thing that was doctored, and let its near miss pass.

Each test changes one packet of a `Talk`, or adds one, and names the assertion that must object - and no other may.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_tcpcp.core.endpoint import Flow
from criu_tcpcp.verify import (
    Capture,
    CaptureError,
    Expectations,
    Negotiated,
    Packet,
    PeerRecord,
    Role,
    Verdict,
    builder,
    check_application,
    check_counters,
    find_connections,
    narrowed,
    parse,
    parse_netstat,
    verify,
)
from criu_tcpcp.verify.packet import ACK, ECE, FIN, PSH, RST, SYN
from criu_tcpcp.verify.seq import ByteStore, RangeSet, before, difference, unwrap
from madeup import FLOW, LOCAL, MACS, MS, PEER, SCALE, Talk, passed

STRICT = Expectations(offload=False, loss_free=True, fin_passed=False, fin_peer=False)
ASKED = replace(STRICT, fin_passed=True, fin_peer=True)


def capture(packets: list[Packet], role: Role = Role.PEER) -> Capture:
    return Capture(role.value, role, tuple(replace(packet, capture=role.value) for packet in packets))


def judge(talk: Talk, expect: Expectations = STRICT) -> Verdict:
    """Through the bytes of a file, so that parser and assertions are tested together."""
    return verify([parse(builder.pcap(builder.frames_of(talk.packets)), "peer.pcap")], FLOW, expect)


def found(talk: Talk, expect: Expectations = STRICT) -> list[int]:
    return sorted({violation.assertion for violation in judge(talk, expect).violations})


@pytest.mark.parametrize("timestamps", [True, False])
@pytest.mark.parametrize("ecn", [True, False])
def test_a_correct_pass_is_clean_and_counted(timestamps: bool, ecn: bool) -> None:
    talk = passed(Talk(timestamps=timestamps, ecn=ecn))
    talk.say(True, flags=ACK | FIN)
    talk.say(False, flags=ACK | FIN)
    talk.say(True)
    verdict = judge(talk, ASKED)
    assert verdict.violations == ()
    assert verdict.ok
    assert verdict.not_checked == ("9: the peer's kernel counters: not given",
                                   "10: the peer's application: no report given")
    assert verdict.counts.packets == {"destination": 4, "origin": 4, "peer": 16}
    assert verdict.counts.bytes == {"passed": 240, "peer": 360}
    assert verdict.counts.retransmissions == {"passed": 0, "peer": 0}
    assert verdict.negotiated == Negotiated(1460, SCALE, timestamps, True, ecn)
    assert verdict.stall_ns == MS
    assert verdict.to_json()["ok"] is True


Doctor = Callable[[Talk], object]
VIOLATIONS: list[tuple[int, str, Doctor]] = [
    (1, "RST from the origin", lambda t: t.ack(flags=RST, ether_src=MACS[Role.DESTINATION])),
    (1, "RST from the peer", lambda t: t.say(True, flags=RST)),
    (1, "SYN after", lambda t: t.ack(flags=SYN, seq=77, ack=0)),
    (1, "no application asked", lambda t: t.ack(flags=FIN | ACK)),
    (2, "after the destination's first", lambda t: t.ack(ether_src=MACS[Role.ORIGIN])),
    (3, "beyond what was sent", lambda t: t.ack(seq=t.next[False] + 1)),
    (3, "differs", lambda t: t.say(False, b"X" * 40, seq=t.next[False] - 40)),
    (3, "below SND.UNA", lambda t: t.ack(seq=t.next[False] - 2)),
    (4, "less than the one before", lambda t: t.ack(ack=t.next[True] - 1, window=1001)),
    (4, "more than the peer sent", lambda t: t.ack(ack=t.next[True] + 1, window=1000)),
    (4, "without ACK", lambda t: t.ack(flags=PSH)),
    (5, "went back by 128", lambda t: t.ack(window=999)),
    (6, "less than the one before", lambda t: t.options(tsval=(t.packets[-2].options.tsval or 0) - 1)),
    (6, "TSecr 0 was never sent", lambda t: t.options(tsecr=0)),
    (6, "was never sent", lambda t: t.options(tsecr=5000)),
    (6, "no timestamp", lambda t: t.options(tsval=None, tsecr=None)),
    (7, "payload 1449 + options 12 > MSS 1460", lambda t: t.say(False, bytes(1449))),
    (7, "beyond what the peer sent", lambda t: t.options(sack=((t.next[True] - 10, t.next[True] + 1),))),
    (7, "is empty", lambda t: t.options(sack=((t.next[True] - 10, t.next[True] - 10),))),
    (7, "before the peer's first byte", lambda t: t.options(sack=((2**32 - 150, 2**32 - 140),))),
    (8, "TTL 63, was 64", lambda t: t.ack(ttl=63)),
    (8, "DSCP 2, was 0", lambda t: t.ack(tos=8)),
    (8, "DF 0, was 1", lambda t: t.ack(df=False)),
    (8, "ECN was not negotiated", lambda t: t.ack(tos=2)),
    (8, "ECN was not negotiated", lambda t: t.ack(flags=ACK | ECE)),
    (9, "the passed end retransmitted 40", lambda t: t.say(False, b"\x67" * 40, seq=t.next[False] - 40)),
    (9, "the peer retransmitted 60", lambda t: t.say(True, b"\3" * 60, seq=t.next[True] - 60)),
]


@pytest.mark.parametrize(("assertion", "text", "doctor"), VIOLATIONS, ids=[f"{row[0]} {row[1]}" for row in VIOLATIONS])
def test_a_doctored_packet_is_found(assertion: int, text: str, doctor: Doctor) -> None:
    talk = passed()
    length = len(talk.packets)
    doctor(talk)
    expect = STRICT if assertion not in (3, 4) else replace(STRICT, loss_free="differs" not in text)
    verdict = judge(talk, expect)
    assert [violation.assertion for violation in verdict.violations] == [assertion]
    (violation,) = verdict.violations
    assert text.replace("from the origin", "from the destination") in violation.reason
    assert isinstance(violation.packet, Packet)
    assert violation.packet.number > length
    assert str(assertion) in str(violation)
    assert violation.to_json()["assertion"] == assertion
    assert not verdict.ok


def ack_of_peer_data(talk: Talk, **changes: object) -> None:
    talk.say(True, b"z" * 60)
    talk.ack(**changes)


def probe_that_crosses_an_acknowledgement(talk: Talk) -> None:
    talk.say(True, b"y" * 60)
    una = talk.next[False]
    talk.say(False, b"w" * 40)
    talk.say(True, b"z" * 60)
    talk.ack(seq=una - 1)


NEAR_MISSES: list[tuple[str, Doctor]] = [
    ("ACK equal", lambda t: t.ack()),
    ("probe at SND.UNA-1", lambda t: t.ack(seq=t.next[False] - 1)),
    ("probe at a SND.UNA whose successor is on its way", probe_that_crosses_an_acknowledgement),
    ("keep-alive with a byte of garbage", lambda t: t.ack(seq=t.next[False] - 1, payload=b"?", payload_len=1)),
    ("TSval equal", lambda t: t.options(tsval=t.packets[-2].options.tsval)),
    ("TSval far ahead", lambda t: t.options(tsval=2**31 - 100)),
    ("an old TSecr", lambda t: t.options(tsecr=t.packets[0].options.tsval)),
    ("edge equal", lambda t: ack_of_peer_data(t, window=1000)),
    ("payload fills the MSS", lambda t: t.say(False, bytes(1448))),
    ("SACK up to what was sent", lambda t: t.options(sack=((t.next[True] - 10, t.next[True]),))),
]


@pytest.mark.parametrize(("name", "doctor"), NEAR_MISSES, ids=[name for name, _ in NEAR_MISSES])
def test_a_near_miss_is_not_found(name: str, doctor: Doctor) -> None:
    talk = passed()
    doctor(talk)
    assert judge(talk).violations == ()


def test_tsecr_zero_is_legal_only_where_the_peers_clock_passed_zero() -> None:
    talk = Talk()
    talk.exchange(1)
    talk.clock[True] = -talk.ticks - 1
    talk.exchange(1)
    assert talk.packets[-2].options.tsecr == 0
    assert found(talk) == []


def test_icmp_about_the_connection_is_found_and_other_icmp_is_not() -> None:
    talk = passed()
    frames = builder.frames_of(talk.packets)
    other = replace(talk.packets[-1], src=replace(PEER, port=1))
    for packet, expected in ((talk.packets[-1], [1]), (other, [])):
        frame = builder.icmp(packet)
        verdict = verify([parse(builder.pcap([*frames, (talk.now, frame, len(frame))]), "peer")], FLOW, STRICT)
        assert [violation.assertion for violation in verdict.violations] == expected


def test_a_window_that_reopens_and_one_that_does_not() -> None:
    talk = passed()
    talk.window = 0
    talk.say(True, b"z" * 1000)
    talk.ack(window=993)        # 993 * 128 + 1000 is 104 beyond the old edge
    for _ in range(128):
        talk.say(True, b"z" * 993)
        edge = talk.packets[-2].window * 128
        talk.ack(window=max(edge - 993 + 127, 0) // 128)
    talk.say(True, b"z" * (talk.packets[-1].window * 128))
    talk.ack(window=0)
    assert found(talk) == [5]
    assert found(replace_last(talk, flags=ACK | FIN), ASKED) == []
    talk.ack(window=10)
    assert found(talk) == []


def replace_last(talk: Talk, **changes: object) -> Talk:
    other = Talk()
    other.packets = [*talk.packets[:-1], replace(talk.packets[-1], **changes)]      # type: ignore[arg-type]
    return other


def test_a_fin_does_not_move_and_nothing_lies_beyond_it() -> None:
    talk = passed()
    talk.ack(flags=ACK | FIN)
    talk.ack()
    again = talk.say(False, flags=ACK | FIN, seq=talk.next[False] - 1)
    assert found(talk, ASKED) == []
    talk.packets[-1] = replace(again, seq=again.seq - 3)
    assert found(talk, ASKED) == [3]
    talk.packets[-1] = replace(again, payload=b"x", payload_len=1, flags=ACK)
    assert found(talk, replace(ASKED, loss_free=False)) == [3]


def test_a_gap_is_judged_by_what_follows() -> None:
    lossy = replace(STRICT, loss_free=False)
    talk = passed()
    hole = talk.next[False]
    talk.next[False] += 40
    talk.say(False, b"b" * 40)
    assert found(talk, lossy) == [3]
    filled = replace_last(talk)
    filled.packets.append(replace(talk.packets[-1], seq=hole, number=99))
    assert found(filled, lossy) == []
    assert found(filled) == [3, 9]
    talk.say(True)
    verdict = judge(talk, lossy)
    assert verdict.ok
    assert "3: 40 bytes at seq" in verdict.not_checked[0]


def test_what_was_not_negotiated_must_not_appear() -> None:
    talk = passed(Talk(timestamps=False, sack=False))
    talk.options(sack=((talk.next[True] - 10, talk.next[True]),))
    assert found(talk) == [7]
    talk = passed(Talk(timestamps=False))
    talk.options(tsval=1, tsecr=1)
    assert found(talk) == [6]


def test_ecn_must_go_on_after_the_pass() -> None:
    talk = Talk(ecn=True)
    talk.exchange()
    talk.move()
    talk.ecn = False
    talk.exchange(2)
    assert found(talk) == []
    talk.exchange(1)
    assert found(talk) == [8]


def test_the_ttl_may_differ_between_hosts_that_are_not_equally_far() -> None:
    talk = passed()
    talk.packets = [replace(packet, ttl=62) if packet.ether_src == MACS[Role.DESTINATION] else packet
                    for packet in talk.packets]
    assert found(talk) == [8]
    verdict = judge(talk, replace(STRICT, equal_hops=False))
    assert verdict.ok
    assert "8: the TTL between the hosts (they are not equally far)" in verdict.not_checked
    talk.packets[-2] = replace(talk.packets[-2], ttl=61)
    assert found(talk, replace(STRICT, equal_hops=False)) == [8]


def test_super_packets_are_legal_where_segmentation_comes_later() -> None:
    talk = passed()
    talk.say(False, bytes(20_000))
    assert found(talk) == [7]
    verdict = judge(talk, replace(STRICT, offload=True))
    assert verdict.ok
    assert "7: the MSS of 1 super-packets (captured before segmentation)" in verdict.not_checked


def burst(silence_ms: int, repeat_from: int) -> Talk:
    """The passed end sends three segments; after `silence_ms` it repeats from segment `repeat_from` on."""
    talk = passed()
    start = talk.next[False]
    for _ in range(3):
        talk.say(False, b"q" * 100)
    talk.now += silence_ms * MS
    for number in range(repeat_from, 3):
        talk.say(False, b"q" * 100, seq=start + 100 * number)
    return talk


@pytest.mark.parametrize(("silence_ms", "repeat_from", "probes", "violations"), [
    (20, 2, 1, []), (3, 2, 0, [9]), (250, 0, 0, [9, 9, 9]), (20, 1, 0, [9, 9])])
def test_one_tail_loss_probe_is_reported_not_judged(silence_ms: int, repeat_from: int, probes: int,
                                                    violations: list[int]) -> None:
    talk = burst(silence_ms, repeat_from)
    verdict = judge(talk)
    assert [violation.assertion for violation in verdict.violations] == violations
    assert verdict.counts.tail_loss_probes["passed"] == probes
    assert verdict.counts.retransmissions["passed"] == 3 - repeat_from
    if silence_ms > 200:
        assert verdict.violations[0].reason.startswith("RTO")


def test_a_tail_loss_probe_whose_acknowledgement_is_held() -> None:
    """A pass holds what the peer has acknowledged; the timer rings meanwhile."""
    talk = passed()
    start = talk.next[False]
    for _ in range(3):
        talk.say(False, b"q" * 100)
    talk.say(True)
    talk.now += 20 * MS
    talk.say(False, b"q" * 100, seq=start + 200)
    verdict = judge(talk)
    assert (verdict.violations, verdict.counts.tail_loss_probes["passed"]) == ((), 1)
    talk.packets[-1] = replace(talk.packets[-1], seq=start + 100)
    assert found(talk) == [9]
    once = passed()
    once.say(False, b"q" * 100)
    once.say(True)
    once.now += 20 * MS
    once.say(False, b"q" * 100, seq=once.next[False] - 100)
    assert found(once) == [9]


def test_an_acknowledgement_of_what_was_sent_twice_is_no_measure_of_the_path() -> None:
    talk = burst(20, 2)
    talk.now += 100 * MS
    talk.say(True)
    for _ in range(3):
        talk.say(False, b"q" * 100)
    talk.now += 10 * MS
    talk.say(False, b"q" * 100, seq=talk.next[False] - 100)
    verdict = judge(talk)
    assert (verdict.violations, verdict.counts.tail_loss_probes["passed"]) == ((), 2)


def test_a_second_tail_loss_probe_is_a_retransmission() -> None:
    talk = burst(20, 2)
    assert judge(talk).counts.tail_loss_probes["passed"] == 1
    talk.now += 50 * MS
    talk.say(False, b"q" * 100, seq=talk.next[False] - 200)
    verdict = judge(talk)
    assert [violation.assertion for violation in verdict.violations] == [9]
    assert judge(talk, replace(STRICT, loss_free=False)).ok


def test_the_stall_is_from_a_request_to_its_acknowledgement() -> None:
    talk = Talk()
    talk.exchange()
    talk.say(True, b"one" * 10)
    asked = talk.now
    talk.now += 5 * MS
    talk.ack(ack=talk.next[True] - 30)      # speaks, but does not acknowledge
    talk.now += 7 * MS
    talk.say(False, b"answer")
    verdict = judge(talk)
    assert verdict.ok
    assert (verdict.stall.answer_ns, verdict.stall.silence_ns, verdict.stall.at_ns) == (14 * MS, 8 * MS, asked)
    talk.say(True, b"two")
    talk.now += 30 * MS
    talk.say(True, b"three")
    assert judge(talk).stall_ns == 31 * MS


def egress(talk: Talk, role: Role) -> list[Packet]:
    """What the capture at one host holds: its own packets, and the peer's."""
    return [packet for packet in talk.packets if packet.ether_src in (MACS[role], MACS[Role.PEER])]


def three(talk: Talk, at_peer: list[Packet] | None = None) -> list[Capture]:
    return [capture(talk.packets if at_peer is None else at_peer), capture(egress(talk, Role.ORIGIN), Role.ORIGIN),
            capture(egress(talk, Role.DESTINATION), Role.DESTINATION)]


def test_a_packet_in_several_captures_is_one_packet() -> None:
    talk = passed()
    verdict = verify(three(talk), FLOW, STRICT)
    assert verdict.ok
    assert verdict.counts.packets == {"destination": 3, "origin": 4, "peer": 14}
    assert verdict.counts.retransmissions == {"passed": 0, "peer": 0}
    rst = talk.ack(flags=RST)
    assert [violation.packet for violation in verify(three(talk), FLOW, STRICT).violations] == [rst]


def test_what_left_a_host_and_did_not_arrive_counts_too() -> None:
    talk = passed()
    arrived = list(talk.packets)
    lost = talk.say(False, b"W" * 40, seq=talk.next[False] - 40, ether_src=MACS[Role.ORIGIN])
    verdict = verify(three(talk, arrived), FLOW, STRICT)
    assert [(violation.assertion, violation.packet) for violation in verdict.violations] == [
        (2, replace(lost, capture="origin")), (3, replace(lost, capture="origin"))]


def late(packet: Packet, by_ms: int) -> Packet:
    return replace(packet, time_ns=packet.time_ns + by_ms * MS)


def split(talk: Talk) -> tuple[list[Packet], list[Packet]]:
    """What the origin sent, and what the destination did."""
    return ([packet for packet in talk.packets if packet.ether_src == MACS[Role.ORIGIN]],
            [packet for packet in talk.packets if packet.ether_src == MACS[Role.DESTINATION]])


@pytest.mark.parametrize("reorders", [False, True])
def test_what_the_path_reordered_is_judged_as_it_was_sent(reorders: bool) -> None:
    """Every fourth packet comes to the peer behind the next ones, and some never do."""
    talk = passed(Talk())
    origin, destination = split(talk)
    answers = [*origin, *destination]
    arrived = [packet for packet in talk.packets if packet.src == PEER]
    arrived += [late(packet, 4) if number % 4 == 2 else packet for number, packet in enumerate(answers)
                if number % 5 != 4]
    verdict = verify([capture(sorted(arrived, key=lambda packet: packet.time_ns)), capture(origin, Role.ORIGIN),
                      capture(destination, Role.DESTINATION)], FLOW,
                     replace(ASKED, loss_free=False, reorders=reorders))
    assert {one.assertion for one in verdict.violations} == (set() if reorders else {4, 5, 6})
    assert [turn.host for turn in verdict.turns] == [Role.ORIGIN, Role.DESTINATION]


def test_on_a_path_that_reorders_what_was_sent_wrongly_is_still_found() -> None:
    talk = passed(Talk())
    origin, destination = split(talk)
    destination[-1] = replace(destination[-1], ack=destination[-1].ack - 100)
    verdict = verify([capture(talk.packets), capture(origin, Role.ORIGIN), capture(destination, Role.DESTINATION)],
                     FLOW, replace(ASKED, loss_free=False, reorders=True))
    assert 4 in {one.assertion for one in verdict.violations}
    with pytest.raises(CaptureError, match="at the peer and at the hosts"):
        verify([capture(talk.packets)], FLOW, replace(ASKED, reorders=True))


def test_egress_captures_alone_are_enough_for_most() -> None:
    talk = passed()
    verdict = verify(three(talk)[1:], FLOW, replace(STRICT, loss_free=False))
    assert verdict.ok
    assert any("no capture at the peer" in text for text in verdict.not_checked)
    talk.ack(ether_src=MACS[Role.ORIGIN])
    assert [violation.assertion for violation in
            verify(three(talk)[1:], FLOW, replace(STRICT, loss_free=False)).violations] == [2]


@pytest.mark.parametrize("ahead_ms", [-5000, -3, 3, 5000])
def test_clocks_that_disagree_are_set_by_the_packets(ahead_ms: int) -> None:
    """Captured there: 1/4 ms after it was sent, each way. Without a correction the origin would speak too late."""
    talk = passed()

    def by_its_clock(capture: Capture, ahead_ns: int) -> Capture:
        return replace(capture, packets=tuple(
            replace(packet, time_ns=packet.time_ns + ahead_ns + (MS // 4 if packet.src == PEER else -MS // 4))
            for packet in capture.packets))

    at_peer, origin, destination = three(talk)
    verdict = verify([at_peer, by_its_clock(origin, 0), by_its_clock(destination, 0)], FLOW, STRICT)
    assert verdict.ok
    assert not any("clock" in text for text in verdict.not_checked)
    wrong = [at_peer, by_its_clock(origin, ahead_ms * MS), by_its_clock(destination, 0)]
    verdict = verify(wrong, FLOW, STRICT)
    assert verdict.violations == ()
    assert (f"origin: its clock was corrected by {-ahead_ms:+.3f} ms, to within 0.250 ms: who of both hosts spoke "
            "first is not told more exactly than that") in verdict.not_checked
    talk.ack(ether_src=MACS[Role.ORIGIN])
    at_peer, origin, destination = three(talk)
    wrong = [at_peer, by_its_clock(origin, ahead_ms * MS), by_its_clock(destination, 0)]
    assert [one.assertion for one in verify(wrong, FLOW, STRICT).violations] == [2]


def test_one_source_address_does_not_tell_the_hosts() -> None:
    talk = passed()
    talk.packets = [replace(packet, ether_src=b"router") for packet in talk.packets]
    verdict = judge(talk)
    assert verdict.ok
    assert any(text.startswith("2: which host") for text in verdict.not_checked)
    assert verdict.counts.packets == {"peer": 14, "unknown": 7}


def test_a_capture_from_the_middle_says_what_it_cannot_check() -> None:
    talk = passed()
    talk.packets = talk.packets[5:]
    verdict = judge(talk)
    assert verdict.ok
    missing = [text[:2] for text in verdict.not_checked]
    assert missing == ["5:", "7:", "7:", "8:", "9:", "10"]  # whether timestamps belong there, the peer shows
    known = replace(STRICT, negotiated=Negotiated(1460, SCALE, True, True, False))
    assert [text[:2] for text in judge(talk, known).not_checked] == ["9:", "10"]
    talk.ack(window=999)
    assert found(talk) == []
    assert found(talk, known) == [5]


@given(st.integers(1, 20))
def test_a_capture_may_begin_anywhere(start: int) -> None:
    talk = passed()
    talk.packets = talk.packets[start:]
    assert judge(talk, replace(STRICT, negotiated=Negotiated(1460, SCALE, True, True, False))).violations == ()


def test_the_connection_is_found_where_one_end_moved() -> None:
    talk = passed()
    assert verify([capture(talk.packets)]).flow == FLOW
    with pytest.raises(CaptureError, match=r"1 connections in the captures, and 0 that were passed: .*cannot be told"):
        verify([capture(talk.packets[:6])])
    with pytest.raises(CaptureError, match="no packet of"):
        verify([capture(talk.packets)], Flow(LOCAL, replace(PEER, port=1)))
    with pytest.raises(CaptureError, match="2 captures of"):
        verify([capture(talk.packets), replace(capture(talk.packets), name="other")], FLOW)


def routed(talk: Talk, role: Role) -> Capture:
    """As captured one router away: at the peer, what comes in has one Ethernet source and a TTL that was counted down;
    at a server, the other way round."""
    here = PEER if role is Role.PEER else LOCAL
    packets = [packet if packet.src == here else replace(packet, ttl=packet.ttl - 1, ether_src=b"router")
               for packet in (talk.packets if role is Role.PEER else egress(talk, role))]
    return capture(packets, role)


def test_behind_a_router_the_ttl_tells_which_end_is_the_capturing_host() -> None:
    talk = passed()
    for captures in ([routed(talk, Role.PEER)], [routed(talk, Role.ORIGIN), routed(talk, Role.DESTINATION)],
                     [routed(talk, Role.PEER), routed(talk, Role.ORIGIN), routed(talk, Role.DESTINATION)]):
        assert verify(captures).flow == FLOW
    (connection,) = find_connections([routed(talk, Role.PEER)])
    assert (connection.flow, connection.ends) == (FLOW, (PEER, LOCAL))
    unknown = replace(routed(talk, Role.PEER), role=Role.UNKNOWN)
    assert find_connections([unknown])[0].why_not == "which end was passed cannot be told"
    contradiction = replace(routed(talk, Role.PEER), role=Role.ORIGIN, name="origin")
    assert find_connections([routed(talk, Role.PEER), contradiction])[0].flow is None


def test_packets_that_the_origin_sends_on_do_not_make_the_peer_the_one_that_moved() -> None:
    talk = passed()
    forwarded = [replace(packet, ether_src=MACS[Role.ORIGIN], ttl=packet.ttl - 1, capture="origin")
                 for packet in talk.packets[-3:] if packet.src == PEER]
    at_origin = routed(talk, Role.ORIGIN)
    at_origin = replace(at_origin, packets=(*at_origin.packets, *forwarded))
    assert verify([routed(talk, Role.PEER), at_origin, routed(talk, Role.DESTINATION)]).flow == FLOW


def test_other_connections_are_told_apart_and_named() -> None:
    talk, other, ssh = passed(), passed(), passed()
    unmoved = replace(PEER, port=6000)
    other.packets = [replace(packet, src=unmoved if packet.src == PEER else LOCAL,
                             dst=unmoved if packet.dst == PEER else LOCAL,
                             ether_src=MACS[Role.PEER if packet.src == PEER else Role.ORIGIN])
                     for packet in other.packets]
    ssh.packets = [replace(packet, src=replace(packet.src, port=22)) for packet in ssh.packets if packet.src == LOCAL]
    captures = [capture([*talk.packets, *other.packets]),
                capture([*egress(talk, Role.ORIGIN), *egress(other, Role.ORIGIN), *ssh.packets], Role.ORIGIN)]
    mine, others, foreign = find_connections(captures)
    assert mine.flow == FLOW
    assert (str(others), others.why_not) == (f"{unmoved} <-> {LOCAL}",
                                             "each end has one Ethernet source: it was not passed")
    assert foreign.why_not == "not in peer"
    assert {flow: [len(one.packets) for one in parts] for flow, parts in narrowed(captures, [FLOW]).items()} == {
        FLOW: [len(talk.packets), len(egress(talk, Role.ORIGIN))]}


def test_there_and_back_each_turn_counts() -> None:
    talk = passed()
    talk.at = Role.ORIGIN
    talk.exchange()
    assert found(talk) == [2]
    twice = replace(STRICT, passes=2)
    verdict = judge(talk, twice)
    assert verdict.violations == ()
    assert [(turn.host, turn.packet.number) for turn in verdict.turns] == [
        (Role.ORIGIN, 2), (Role.DESTINATION, 14), (Role.ORIGIN, 23)]
    assert verdict.to_json()["turns"][1] == {"host": "destination", "capture": "peer.pcap", "number": 14,
                                             "time_ns": talk.packets[13].time_ns}
    talk.ack(ether_src=MACS[Role.DESTINATION])
    (violation,) = judge(talk, twice).violations
    assert violation.assertion == 2
    assert "after the origin's first packet of its last turn (2 passes)" in violation.reason
    assert verify(three(talk), FLOW, replace(STRICT, passes=3)).ok
    assert [one.assertion for one in verify(three(talk), FLOW, twice).violations] == [2]


def test_an_egress_capture_in_which_its_host_is_silent_proves_that_too() -> None:
    talk = Talk()
    talk.exchange()
    verdict = verify(three(talk), FLOW, STRICT)
    assert [turn.host for turn in verdict.turns] == [Role.ORIGIN]
    assert not any(text.startswith("2:") for text in verdict.not_checked)


def test_probes_are_counted() -> None:
    talk = passed()
    talk.ack(seq=talk.next[False] - 1)
    talk.say(True, seq=talk.next[True] - 1)
    talk.say(True, seq=talk.next[True] - 1)
    assert judge(talk).counts.probes == {"passed": 1, "peer": 2}


def test_a_violation_names_its_packet() -> None:
    talk = passed()
    packet = talk.ack(flags=RST)
    said = judge(talk).to_json()["violations"]
    assert [(one["assertion"], one["capture"], one["number"], one["time_ns"], one["seq"]) for one in said] == [
        (1, "peer.pcap", packet.number, packet.time_ns, packet.seq)]
    icmp = builder.icmp(talk.packets[-2])
    data = builder.pcap([*builder.frames_of(talk.packets[:-1]), (talk.now, icmp, len(icmp))])
    (one,) = verify([parse(data, "peer.pcap")], FLOW, STRICT).to_json()["violations"]
    assert (one["number"], one["seq"]) == (packet.number, None)


def test_a_snap_length_limits_the_comparison_of_bytes_only() -> None:
    talk = passed()
    talk.packets = [replace(packet, payload=packet.payload[:10]) for packet in talk.packets]
    assert judge(talk).ok
    assert "3: 180 payload bytes of the passed end, which the snap length cut off, were not compared" \
        in judge(talk).not_checked
    lossy = replace(STRICT, loss_free=False)
    again = talk.say(False, b"\x67" * 40, seq=talk.next[False] - 40)
    assert found(talk, lossy) == []
    talk.packets[-1] = replace(again, payload=b"\x67" * 9 + b"!" * 31)
    assert found(talk, lossy) == [3]


def test_counters_that_moved_and_others() -> None:
    before_, after = {"TcpExtTCPTimeouts": 3, "TcpExtDelayedACKs": 1}, {"TcpExtTCPTimeouts": 3, "TcpExtDelayedACKs": 9}
    assert check_counters(before_, after) == []
    moved = check_counters(before_, {**after, "TcpExtTCPAbortOnData": 1, "TcpExtPAWSEstab": 2})
    assert [violation.reason for violation in moved] == ["the peer's PAWSEstab went from 0 to 2",
                                                        "the peer's TCPAbortOnData went from 0 to 1"]
    assert {violation.assertion for violation in moved} == {9}
    with pytest.raises(ValueError, match="no counters"):
        check_counters({}, {})
    text = "TcpExt: TCPTimeouts PAWSEstab\nTcpExt: 4 0\nIpExt: InOctets\nIpExt: 12\n"
    assert parse_netstat(text) == {"TcpExtTCPTimeouts": 4, "TcpExtPAWSEstab": 0, "IpExtInOctets": 12}
    with pytest.raises(CaptureError, match="netstat"):
        parse_netstat("TcpExt: a b\nTcpExt: 1\n")


def test_the_peers_application() -> None:
    record = PeerRecord.from_json({"error": None, "stall_max_ns": 5 * MS, "requests": 1})
    assert check_application(record) == []
    assert check_application(record, 5 * MS) == []
    assert [violation.assertion for violation in check_application(record, 4 * MS)] == [10]
    assert "end of stream" in check_application(PeerRecord("end of stream", 0))[0].reason
    for wrong in ({}, {"error": 1, "stall_max_ns": 1}, {"error": None, "stall_max_ns": -1}, None):
        with pytest.raises(CaptureError, match="not a peer program's report"):
            PeerRecord.from_json(wrong)
    verdict = verify([capture(passed().packets)], FLOW, STRICT, counters=({"TCPTimeouts": 1}, {"TCPTimeouts": 2}),
                     application=record, stall_budget_ns=MS)
    assert [violation.assertion for violation in verdict.violations] == [9, 10]
    assert verdict.not_checked == ()


@given(st.integers(0, 2**32 - 1), st.integers(-2**31, 2**31 - 1))
def test_sequence_arithmetic_wraps(number: int, step: int) -> None:
    other = (number + step) % 2**32
    assert difference(other, number) == step
    assert before(other, number) == (step < 0)
    assert unwrap(number + 2**40, other) == number + 2**40 + step


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=30))
def test_range_set_is_a_set(ranges: list[tuple[int, int]]) -> None:
    known: set[int] = set()
    made = RangeSet()
    for start, length in ranges:
        piece = set(range(start, start + length))
        assert made.add(start, start + length) == len(piece - known)
        known |= piece
        assert made.total == len(known)
        assert made.covers(start - 3, start + length) == (set(range(start - 3, start + length)) <= known)


@given(st.lists(st.tuples(st.integers(0, 60), st.binary(max_size=12)), max_size=20))
def test_byte_store_remembers_the_first_byte_at_each_place(pieces: list[tuple[int, bytes]]) -> None:
    known: dict[int, int] = {}
    store = ByteStore()
    for start, data in pieces:
        wrong = [start + i for i, byte in enumerate(data) if known.get(start + i, byte) != byte]
        assert store.add(start, data) == (wrong[0] if wrong else None)
        for i, byte in enumerate(data):
            known.setdefault(start + i, byte)
