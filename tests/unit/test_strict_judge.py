"""What the strict peer objects to: for each rule a segment that breaks it, and its near miss, which does not.

The conversation so far: both offered everything; we (sequence numbers from 1000, window scale 7) have sent 100 bytes at
1001 with timestamp 510, and 100 more at 1101 with 520; the other end (from 5000, window scale 7) has sent 50 bytes at
5001, which we acknowledged with 520, and it has acknowledged our first 100.
"""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import Any

import pytest

from criu_tcpcp.core.endpoint import Endpoint
from criu_tcpcp.lab.strict.judge import Judge, Path, Violation
from criu_tcpcp.verify.packet import ACK, CWR, ECE, FIN, PSH, RST, SYN, URG, Options, Packet

US = Endpoint(ipaddress.ip_address("10.0.0.1"), 40000)
THEM = Endpoint(ipaddress.ip_address("10.0.0.2"), 9000)
STAMPED = 12


def packet(src: Endpoint, seq: int, ack: int, *, flags: int = ACK, payload: bytes = b"", window: int = 512,
           options: Options | None = None, **more: Any) -> Packet:
    return Packet(time_ns=0, capture="test", number=1, ip_version=4, src=src, dst=THEM if src == US else US, seq=seq,
                  ack=ack, flags=flags, window=window, payload=payload, payload_len=len(payload),
                  options=options or Options(), df=True, **more)


def syn_options(tsval: int, tsecr: int, *, mss: int = 1460, timestamps: bool = True, sack: bool = True,
                scale: int | None = 7) -> Options:
    return Options(mss=mss, window_scale=scale, sack_permitted=sack, tsval=tsval if timestamps else None,
                   tsecr=tsecr if timestamps else None)


def stamps(tsval: int, tsecr: int, sack: tuple[tuple[int, int], ...] = ()) -> Options:
    return Options(STAMPED + (4 + 8 * len(sack) if sack else 0), tsval=tsval, tsecr=tsecr, sack=sack)


def conversation(path: Path | None = None, **ours: Any) -> Judge:
    """A judge that has seen all that is told above."""
    judge = Judge(path)
    timestamps = ours.get("timestamps", True)

    def options(tsval: int, tsecr: int) -> Options:
        return stamps(tsval, tsecr) if timestamps else Options()

    judge.sent(packet(US, 1000, 0, flags=SYN, window=65535, options=syn_options(500, 0, **ours)))
    judge.see(packet(THEM, 5000, 1001, flags=SYN | ACK, window=65535,
                     options=replace(syn_options(9000, 500, **ours), mss=1460)))
    judge.sent(packet(US, 1001, 5001, options=options(505, 9000)))
    judge.sent(packet(US, 1001, 5001, payload=b"q" * 100, options=options(510, 9000)))
    judge.see(packet(THEM, 5001, 1101, payload=b"a" * 50, options=options(9010, 510)))
    judge.sent(packet(US, 1101, 5051, payload=b"r" * 100, options=options(520, 9010)))
    return judge


def theirs(seq: int = 5051, ack: int = 1201, tsval: int = 9020, tsecr: int = 520, *,
           sack: tuple[tuple[int, int], ...] = (), **more: Any) -> Packet:
    """What may well come next."""
    return packet(THEM, seq, ack, **{"options": stamps(tsval, tsecr, sack), **more})


PAYLOAD = b"b" * 30
WINDOW_END = 5051 + (512 << 7)
CASES: dict[str, tuple[str, Packet, Packet]] = {
    # name: (rule, breaks it, its near miss)
    "reset": ("rst", theirs(flags=RST | ACK), theirs()),
    "syn": ("syn", theirs(5000, 1001, flags=SYN | ACK, options=syn_options(9020, 520)), theirs(flags=ACK | PSH)),
    "no ack": ("ack", theirs(flags=PSH, payload=PAYLOAD), theirs(payload=PAYLOAD)),
    "urgent": ("urgent", theirs(flags=ACK | URG, payload=PAYLOAD), theirs(payload=PAYLOAD)),
    "unasked fin": ("fin", theirs(flags=ACK | FIN), theirs()),
    "ack beyond": ("ack", theirs(ack=1202), theirs(ack=1201)),
    "ack goes back": ("ack", theirs(ack=1100, tsecr=510), theirs(ack=1101, tsecr=510)),
    "seq beyond": ("sequence", theirs(5052, payload=PAYLOAD), theirs(5051, payload=PAYLOAD)),
    "changed byte": ("bytes", theirs(5001, 1101, tsecr=510, payload=b"a" * 49 + b"x"),
                     theirs(5001, 1101, tsecr=510, payload=b"a" * 50)),
    "known bytes again": ("sequence", theirs(5001, 1101, tsecr=520, payload=b"a" * 50),
                          theirs(5001, 1101, tsecr=510, payload=b"a" * 50)),
    "known bytes again, by the ack": ("sequence", theirs(5001, payload=b"a" * 50), theirs(5051, payload=PAYLOAD)),
    "probe too low": ("sequence", theirs(5049), theirs(5050)),
    "probe byte too low": ("sequence", theirs(5049, payload=b"a"), theirs(5050, payload=b"a")),
    "behind the window": ("window", theirs(WINDOW_END - 29, payload=PAYLOAD), theirs(WINDOW_END - 30, payload=PAYLOAD)),
    "right edge": ("right-edge", theirs(window=511), theirs(window=512)),
    "tsval goes back": ("tsval", theirs(tsval=9009), theirs(tsval=9010)),
    "no timestamp": ("timestamp", theirs(options=Options()), theirs()),
    "tsecr zero": ("tsecr", theirs(tsecr=0), theirs(tsecr=520)),
    "tsecr never sent": ("tsecr", theirs(tsecr=519), theirs(tsecr=520)),
    "tsecr goes back": ("tsecr", theirs(ack=1101, tsecr=505), theirs(ack=1101, tsecr=510)),
    "tsecr of what it has not got": ("tsecr", theirs(ack=1100, tsecr=520), theirs(ack=1101, tsecr=520)),
    "tsecr older than what it acknowledges": ("tsecr", theirs(ack=1102, tsecr=510), theirs(ack=1101, tsecr=510)),
    "too large": ("mss", theirs(payload=bytes(1449)), theirs(payload=bytes(1448))),
    "sack beyond": ("sack", theirs(ack=1101, tsecr=510, sack=((1150, 1202),)),
                    theirs(ack=1101, tsecr=510, sack=((1150, 1201),))),
    "sack before the first byte": ("sack", theirs(ack=1101, tsecr=510, sack=((1000, 1101),)),
                                   theirs(ack=1101, tsecr=510, sack=((1001, 1101),))),
    "empty sack": ("sack", theirs(ack=1101, tsecr=510, sack=((1150, 1150),)),
                   theirs(ack=1101, tsecr=510, sack=((1150, 1151),))),
    "old sack block in the second place": ("sack", theirs(ack=1101, tsecr=510, sack=((1150, 1160), (1100, 1101))),
                                           theirs(ack=1101, tsecr=510, sack=((1100, 1101), (1150, 1160)))),
    "ttl": ("ip-header", theirs(ttl=63), theirs(ttl=64)),
    "tos": ("ip-header", theirs(tos=8), theirs(tos=0)),
    "df": ("ip-header", replace(theirs(), df=False), replace(theirs(), df=True)),
    "ecn": ("ecn", theirs(tos=2), theirs(tos=0)),
    "ece": ("ecn", theirs(flags=ACK | ECE | CWR), theirs(flags=ACK)),
    "fragment": ("fragment", theirs(fragment=True), theirs()),
}


@pytest.mark.parametrize("case", CASES)
def test_it_objects_to_a_lie_and_not_to_its_near_miss(case: str) -> None:
    rule, lie, near_miss = CASES[case]
    path = Path(lossless=case == "seq beyond")
    conversation(path).see(near_miss)
    with pytest.raises(Violation) as caught:
        conversation(path).see(lie)
    assert caught.value.rule == rule
    assert caught.value.packet is lie
    assert str(lie) in str(caught.value)


def test_a_gap_is_no_lie_where_packets_are_lost() -> None:
    conversation(Path(lossless=False)).see(theirs(5052, payload=PAYLOAD))


def test_a_byte_may_probe_the_closed_window_and_no_more() -> None:
    for lie, near_miss in ((theirs(WINDOW_END + 1, payload=b"x"), theirs(WINDOW_END, payload=b"x")),
                           (theirs(WINDOW_END, payload=b"xy"), theirs(WINDOW_END, payload=b"x"))):
        conversation().see(near_miss)
        with pytest.raises(Violation, match="window: it sends"):
            conversation().see(lie)


def test_a_fin_comes_where_the_stream_ends_and_stays_there() -> None:
    def judge() -> Judge:
        made = conversation()
        made.fin_after = 80
        return made

    good = judge()
    good.see(theirs(payload=PAYLOAD, flags=ACK | FIN))
    good.see(theirs(payload=PAYLOAD, flags=ACK | FIN))  # once more
    with pytest.raises(Violation, match="fin: the FIN has moved from 5081 to 5080"):
        good.see(theirs(payload=PAYLOAD[:-1], flags=ACK | FIN))
    with pytest.raises(Violation, match="fin: bytes behind the FIN"):
        good.see(theirs(5081, payload=b"x"))
    with pytest.raises(Violation, match="fin: a FIN after 79 bytes"):
        judge().see(theirs(payload=PAYLOAD[:-1], flags=ACK | FIN))


def test_overtaken_packets_are_not_held_against_it() -> None:
    for case in ("ack goes back", "right edge", "tsval goes back", "tsecr goes back"):
        conversation(Path(ordered=False)).see(CASES[case][1])


def test_it_may_echo_an_old_timestamp_while_it_has_holes() -> None:
    """Linux does, when a late segment fills one and carries an old acknowledgement."""
    judge = conversation()
    judge.see(theirs(ack=1101, tsecr=510, sack=((1150, 1201),)))
    judge.see(theirs(tsval=9021, tsecr=510))


@pytest.mark.parametrize(("missing", "rule", "lie"), [
    ("timestamps", "timestamp", theirs()),
    ("sack", "sack", theirs(ack=1101, tsecr=510, sack=((1150, 1201),)))])
def test_it_objects_to_what_was_not_negotiated(missing: str, rule: str, lie: Packet) -> None:
    judge = conversation(**{missing: False})
    with pytest.raises(Violation) as caught:
        judge.see(lie)
    assert caught.value.rule == rule


def test_windows_are_not_scaled_unless_both_scale() -> None:
    judge = conversation(scale=None)
    judge.see(theirs(window=512))
    with pytest.raises(Violation, match="right-edge"):
        judge.see(theirs(window=511))
    assert judge.our_scale == judge.their_scale == 0


SYN_ACK = packet(THEM, 5000, 1001, flags=SYN | ACK, options=syn_options(9000, 500))


@pytest.mark.parametrize(("offer", "answer", "rule"), [
    ({}, replace(SYN_ACK, ack=1002), "ack"),
    ({}, replace(SYN_ACK, flags=RST | ACK), "rst"),
    ({}, replace(SYN_ACK, flags=ACK), "syn"),
    ({}, replace(SYN_ACK, flags=SYN), "syn"),
    ({}, replace(SYN_ACK, flags=SYN | ACK | FIN), "syn"),
    ({}, replace(SYN_ACK, flags=SYN | ACK | ECE), "ecn"),
    ({}, replace(SYN_ACK, options=syn_options(9000, 0)), "tsecr"),
    ({"timestamps": False}, SYN_ACK, "syn"), ({"sack": False}, SYN_ACK, "syn"), ({"scale": None}, SYN_ACK, "syn")])
def test_the_handshake(offer: dict[str, Any], answer: Packet, rule: str) -> None:
    def judge(**ours: Any) -> Judge:
        made = Judge()
        made.sent(packet(US, 1000, 0, flags=SYN, options=syn_options(500, 0, **ours)))
        return made

    judge().see(SYN_ACK)
    with pytest.raises(Violation) as caught:
        judge(**offer).see(answer)
    assert caught.value.rule == rule


def test_the_same_syn_may_come_again_until_something_follows_it() -> None:
    judge = Judge()
    judge.sent(packet(US, 1000, 0, flags=SYN, options=syn_options(500, 0)))
    judge.see(SYN_ACK)
    judge.see(SYN_ACK)
    with pytest.raises(Violation, match="syn: a SYN after the handshake"):
        judge.see(replace(SYN_ACK, seq=5001))


def test_numbers_and_timestamps_pass_through_the_end_of_their_circle() -> None:
    turn = 1 << 32
    judge = Judge()
    judge.sent(packet(US, turn - 1, 0, flags=SYN, options=syn_options(turn - 2, 0)))
    judge.see(packet(THEM, turn - 11, 0, flags=SYN | ACK, window=60000, options=syn_options(turn - 1, turn - 2)))
    judge.sent(packet(US, 0, turn - 10, options=stamps(turn - 1, turn - 1)))
    judge.sent(packet(US, 0, turn - 10, payload=bytes(20), options=stamps(3, turn - 1)))
    judge.see(packet(THEM, turn - 10, 20, payload=bytes(30), options=stamps(2, 3)))
    assert judge.numbers["sent_end"] == judge.numbers["acked"] == 20
    with pytest.raises(Violation, match="tsval: TSval 4294967295 is 3 less"):
        judge.see(packet(THEM, 20, 20, options=stamps(turn - 1, 3)))
