"""Captures: golden bytes written by tcpdump, every format and link type, and bytes that are no capture at all."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from criu_tcpcp.core.endpoint import Endpoint
from criu_tcpcp.verify import Capture, CaptureError, Packet, Role, builder, parse
from criu_tcpcp.verify.packet import ACK, FIN, PSH, SYN, Options

GOLDEN = (Path(__file__).parent.parent / "data" / "loopback-v4-v6.pcap").read_bytes()
V4 = Endpoint(ipaddress.ip_address("10.0.0.1"), 1000), Endpoint(ipaddress.ip_address("10.0.0.2"), 2000)
V6 = Endpoint(ipaddress.ip_address("fd00::1"), 1000), Endpoint(ipaddress.ip_address("fd00::2"), 2000)
PLAIN = Packet(time_ns=1_700_000_000_123_456_000, capture="x", number=1, ip_version=4, src=V4[0], dst=V4[1], seq=7,
               ack=9, flags=ACK | PSH, window=500, payload=b"hello", payload_len=5,
               options=Options(12, tsval=3, tsecr=4), ttl=61, tos=0x0A, df=True, ether_src=b"\2\0\0\0\0\1")


def one(data: bytes, name: str = "x") -> Packet:
    (packet,) = parse(data, name).packets
    return packet


def test_golden_bytes_of_tcpdump() -> None:
    capture = parse(GOLDEN, "peer.pcap")
    assert (capture.role, len(capture.packets), capture.damaged, capture.fragments) == (Role.PEER, 28, 0, 0)
    first, second = capture.packets[:2]
    assert str(first) == "peer.pcap #1 127.0.0.1:57310 > 127.0.0.1:9002 [S] seq 961598131 ack 0 win 65495 len 0"
    assert first.time_ns // 1000 == 1795508952102414
    assert first.options == Options(20, 65495, 10, True, (), 4263828531, 0)
    assert second.options.tsecr == 4263828531
    assert (first.ttl, first.tos, first.df, first.ether_src) == (64, 0, True, bytes(6))
    sizes = [packet.payload_len for packet in capture.packets if packet.ip_version == 6]
    assert sizes == [0, 0, 0, 10, 0, 10, 0, 100, 100, 1000, 1000, 0, 0, 0]
    cut = [packet for packet in capture.packets if len(packet.payload) != packet.payload_len]
    assert {len(packet.payload) for packet in cut} == {300 - 66, 300 - 86}
    assert cut[0].payload == bytes(i % 251 for i in range(234))
    assert capture.packets[-3].flags == FIN | ACK


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("nanoseconds", [True, False])
def test_pcap_in_every_byte_order_and_unit(order: str, nanoseconds: bool) -> None:
    assert one(builder.pcap(builder.frames_of([PLAIN]), order=order, nanoseconds=nanoseconds)) == PLAIN


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("resolution", [6, 9, 0x80 | 30])
def test_pcapng_in_every_byte_order_and_unit(order: str, resolution: int) -> None:
    found = one(builder.pcapng(builder.frames_of([PLAIN]), order=order, resolution=resolution))
    assert abs(found.time_ns - PLAIN.time_ns) < 1000
    assert replace(found, time_ns=PLAIN.time_ns) == PLAIN


def test_pcapng_with_several_interfaces_of_different_link_types_and_unknown_blocks() -> None:
    inner = builder.datagram(PLAIN)
    ethernet = builder.ethernet(PLAIN)
    data = builder.pcapng([(1, ethernet, len(ethernet)), (2, inner, len(inner)), (3, ethernet, len(ethernet))],
                          link_types=(1, 101))
    simple = struct.pack("<III", 3, 20, 4) + b"abcd" + struct.pack("<I", 20)
    unknown = struct.pack("<II", 0xBAD, 16) + b"abcd" + struct.pack("<I", 16)
    capture = parse(data + simple + unknown + data, "x")
    packets = capture.packets
    assert capture.untimed == 1
    assert [packet.payload for packet in packets] == [b"hello"] * 6
    assert [packet.ether_src is None for packet in packets] == [False, True, False] * 2


def sll(packet: Packet, outgoing: bool) -> bytes:
    return struct.pack("!HHH", 4 if outgoing else 0, 1, 6) + b"\2\0\0\0\0\1\0\0\x08\0" + builder.datagram(packet)


def sll2(packet: Packet, outgoing: bool) -> bytes:
    head = struct.pack("!HHIHBB", 0x0800, 0, 3, 1, 4 if outgoing else 0, 6)
    return head + b"\2\0\0\0\0\1\0\0" + builder.datagram(packet)


@pytest.mark.parametrize("outgoing", [True, False])
def test_cooked_captures_tell_the_direction(outgoing: bool) -> None:
    for link_type, frame in ((113, sll(PLAIN, outgoing)), (276, sll2(PLAIN, outgoing))):
        assert one(builder.pcap([(PLAIN.time_ns, frame, len(frame))], link_type=link_type)) == replace(
            PLAIN, outgoing=outgoing)


@pytest.mark.parametrize(("link_type", "prefix"), [(101, b""), (12, b""), (228, b""), (0, b"\2\0\0\0"),
                                                   (108, b"\0\0\0\2")])
def test_link_types_without_a_header(link_type: int, prefix: bytes) -> None:
    frame = prefix + builder.datagram(PLAIN)
    assert one(builder.pcap([(PLAIN.time_ns, frame, len(frame))], link_type=link_type)) == replace(
        PLAIN, ether_src=None)


def test_vlan_tags_and_padding() -> None:
    frame = builder.ethernet(PLAIN)
    tagged = frame[:12] + b"\x88\xa8\0\5\x81\0\0\7" + frame[12:] + bytes(20)
    assert one(builder.pcap([(PLAIN.time_ns, tagged, len(tagged))])) == PLAIN


def v6(extension: bytes, first: int) -> bytes:
    packet = replace(PLAIN, ip_version=6, src=V6[0], dst=V6[1])
    inner = extension + builder.segment(packet)
    head = struct.pack("!IHBB", 6 << 28 | 0x0A << 20, len(inner), first, 61)
    return builder.ethernet(packet, head + V6[0].address.packed + V6[1].address.packed + inner)


@pytest.mark.parametrize(("extension", "first"), [
    (b"", 6), (b"\x06\0" + bytes(6), 0), (b"\x2b\1" + bytes(14) + b"\x3c\0" + bytes(6) + b"\x06\0" + bytes(6), 0)])
def test_ipv6_extension_headers(extension: bytes, first: int) -> None:
    frame = v6(extension, first)
    assert one(builder.pcap([(PLAIN.time_ns, frame, len(frame))])) == replace(
        PLAIN, ip_version=6, src=V6[0], dst=V6[1])


def test_fragments_are_flagged_or_counted() -> None:
    first = builder.ethernet(replace(PLAIN, fragment=True))
    later = first[:20] + b"\x20\x10" + first[22:]
    first6, later6 = (v6(b"\x06\0" + offset + bytes(4), 44) for offset in (b"\0\1", b"\0\x11"))
    capture = parse(builder.pcap([(0, frame, len(frame)) for frame in (first, later, first6, later6)]), "x")
    assert [packet.fragment for packet in capture.packets] == [True, True]
    assert capture.fragments == 2


def test_a_packet_longer_than_its_length_field_can_say() -> None:
    big = bytearray(builder.ethernet(replace(PLAIN, payload=bytes(70000), payload_len=0)))
    big[16:18] = b"\0\0"
    assert one(builder.pcap([(0, bytes(big), len(big))])).payload_len == 70000


@pytest.mark.parametrize("version", [4, 6])
def test_icmp_errors_name_the_connection(version: int) -> None:
    ends = V4 if version == 4 else V6
    packet = replace(PLAIN, ip_version=version, src=ends[0], dst=ends[1])
    kind, code = (3, 4) if version == 4 else (2, 0)
    frame = builder.icmp(packet, kind, code)
    (error,) = parse(builder.pcap([(5, frame, len(frame))]), "x").icmp
    assert (error.kind, error.code, error.quoted_src, error.quoted_dst) == (kind, code, *ends)


def test_what_is_not_tcp_is_left_out() -> None:
    udp = bytearray(builder.ethernet(PLAIN))
    udp[23] = 17
    arp = bytes(12) + b"\x08\x06" + bytes(28)
    echo = builder.icmp(PLAIN, 8, 0)
    no_port = builder.ethernet(PLAIN)[:34] + b"\0\0" + builder.ethernet(PLAIN)[36:]
    capture = parse(builder.pcap([(0, bytes(frame), len(frame)) for frame in (udp, arp, echo, no_port)]), "x")
    assert capture == Capture("x", Role.UNKNOWN, (), damaged=1)


addresses = st.sampled_from([V4, V6])
numbers = st.integers(0, 0xFFFFFFFF)


@st.composite
def packets(draw: st.DrawFn) -> Packet:
    src, dst = draw(addresses)
    payload = draw(st.binary(max_size=100))
    tsval = draw(st.none() | numbers)
    sack = draw(st.lists(st.tuples(numbers, numbers), max_size=3))
    plain = Options(0, draw(st.none() | st.integers(0, 65535)), draw(st.none() | st.integers(0, 14)),
                    draw(st.booleans()), tuple(sack) if tsval is None else tuple(sack[:1]), tsval,
                    None if tsval is None else draw(numbers))
    length = len(builder.options(plain))
    options = replace(plain, length=length) if length <= 40 else Options()
    version = src.address.version
    return Packet(draw(st.integers(0, 2**32 * 10**9 - 1)), "x", 1, version, src, dst, draw(numbers), draw(numbers),
                  draw(st.integers(0, 0x1FF)), draw(st.integers(0, 65535)), payload,
                  len(payload) + draw(st.sampled_from([0, 1, 1000])), options, draw(st.integers(0, 255)),
                  draw(st.integers(0, 255)), version == 6 or draw(st.booleans()),
                  draw(st.binary(min_size=6, max_size=6)))


@given(st.lists(packets(), min_size=1, max_size=5))
def test_what_is_built_is_parsed_again(made: list[Packet]) -> None:
    made = [replace(packet, number=index + 1) for index, packet in enumerate(made)]
    records = builder.frames_of(made)
    assert parse(builder.pcap(records), "x").packets == tuple(made)
    assert parse(builder.pcapng(records), "x").packets == tuple(made)


STARTS = [b"", GOLDEN[:24], builder.pcapng([]), builder.pcapng([], order=">"), builder.pcap([], order=">")]


@settings(max_examples=300)
@given(st.sampled_from(STARTS), st.binary(max_size=2000))
def test_garbage_is_a_capture_error_or_a_capture(start: bytes, garbage: bytes) -> None:
    try:
        capture = parse(start + garbage, "x")
    except CaptureError:
        return
    assert len(capture.packets) <= len(garbage) // 40


WHOLE = [GOLDEN, builder.pcapng(builder.frames_of([PLAIN] * 3))]


@settings(max_examples=300)
@given(st.sampled_from(WHOLE), st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=20),
       st.integers(0, 4000))
def test_a_damaged_capture_is_an_error_or_a_capture(data: bytes, changes: list[tuple[int, int]], end: int) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    try:
        capture = parse(bytes(damaged[:end]), "x")
    except CaptureError:
        return
    assert len(capture.packets) <= len(data) // 40


@pytest.mark.parametrize("kind", [6, 1, 0x0A0D0D0A])
@pytest.mark.parametrize("length", [0, 8, 11, 12, 13, 0xFFFFFFFC, 0x7FFFFFFC])
def test_a_block_length_is_not_believed(kind: int, length: int) -> None:
    data = builder.pcapng([]) + struct.pack("<II", kind, length) + bytes(60)
    with pytest.raises(CaptureError):
        parse(data, "x")


@pytest.mark.parametrize(("data", "text"), [
    (GOLDEN[:-1], "claims"), (GOLDEN[:30], "ends inside the header of packet 1"), (GOLDEN[:20], "pcap header"),
    (b"GIF89a, surely", "unknown magic"), (b"", "too few"), (GOLDEN[:4] + b"\3" + GOLDEN[5:], "version 3"),
    (builder.pcap([(0, bytes(20), 20)], link_type=105), "link type 105")])
def test_what_is_wrong_is_said(data: bytes, text: str) -> None:
    with pytest.raises(CaptureError, match=text) as raised:
        parse(data, "bad.pcap")
    assert raised.value.__notes__ == ["in bad.pcap"]


def test_a_name_tells_the_role() -> None:
    assert Role.of_name("/tmp/Origin-eth0.pcap") is Role.ORIGIN
    assert Role.of_name("destination.pcapng") is Role.DESTINATION
    assert Role.of_name("trace.pcap") is Role.UNKNOWN
    assert PLAIN.sequence_length == 5
    assert replace(PLAIN, flags=SYN | FIN).sequence_length == 7
