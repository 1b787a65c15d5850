"""CRIU's images: what is written is what is read, by us and by CRIU's own loader; the hostile is a ProtocolError."""

from __future__ import annotations

import base64
import io
import json
import struct
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_tcpcp.core import criu
from criu_tcpcp.core.errors import ProtocolError
from criu_tcpcp.core.image import Image, decode, decode_stream, encode
from criu_tcpcp.core.options import TABLE, Form
from criu_tcpcp.core.state import ConnectionState, Negotiated, Window
from criu_tcpcp.core.tcp import TcpState
from states import FLOWS, plain, states

OPTIONS = {"SO_SNDBUF": 87040, "SO_RCVBUF": 131072, "SO_RCVTIMEO": (1, 500000), "SO_SNDTIMEO": (0, 0),
           "SO_BINDTODEVICE": "", "SO_ATTACH_FILTER": "", "SO_LINGER": (1, 5), "SO_KEEPALIVE": 1,
           "TCP_KEEPIDLE": 77, "SO_REUSEADDR": 1, "TCP_CONGESTION": "cubic", "TCP_NODELAY": 1, "IP_TTL": 33}
CASES: dict[str, ConnectionState] = {
    "v4": plain(options=OPTIONS),
    "v6": plain(options=OPTIONS | {"IPV6_UNICAST_HOPS": 9}, flow=replace(FLOWS["v6"], scope_id=3), nonblocking=True),
    "mapped": plain(options=OPTIONS, flow=FLOWS["mapped"]),
    "close-wait": plain(options=OPTIONS, tcp_state=TcpState.CLOSE_WAIT),
    "bare": plain(options=OPTIONS, negotiated=Negotiated(536, False, 0, 0, False, False), timestamp=None,
                  ts_recent=None, received=b"", outgoing=b"", unsent=0)}

# Written once, by this program. A change here is a change of the format: images of another version must still be read.
GOLDEN: dict[str, Image] = {
    "v4": Image(
        bytes.fromhex(
            "080110d209180220012806300138a84640c0b8024802500058c081880860c6e790136a0a08001000180020002800721d0880"
            "a8051080800818002000280130a0c21e3801980101a8014dc00105"),
        bytes.fromhex(
            "19435654065546512d000000080510e807180a2088272807300738b40b400848c0c407600368e7077080f6037880f6038001"
            "88fd038801e80768656c6c6f696e2d666c6967687454"),
        b'{"congestion":{"rto_us":204000,"rtt_us":200,"rttvar_us":50,"snd_cwnd":10,"snd_ssthresh":2147483647},'
        b'"options":{"IP_TTL":33,"TCP_CONGESTION":"cubic","TCP_NODELAY":1},"scope_id":0,"ts_recent":654321,"ve'
        b'rsion":1}'),
    "v6": Image(
        bytes.fromhex(
            "080110d209180a20012806300138a84640c0b802488210500058a082b4c00b58005800588080800860a082b4c00b60800260"
            "0060808080106a0a08001000180020002800721d0880a8051080800818002000280130a0c21e3801980101a8014dc00105"),
        bytes.fromhex(
            "19435654065546512d000000080510e807180a2088272807300738b40b400848c0c407600368e7077080f6037880f6038001"
            "88fd038801e80768656c6c6f696e2d666c6967687454"),
        b'{"congestion":{"rto_us":204000,"rtt_us":200,"rttvar_us":50,"snd_cwnd":10,"snd_ssthresh":2147483647},'
        b'"options":{"IPV6_UNICAST_HOPS":9,"IP_TTL":33,"TCP_CONGESTION":"cubic","TCP_NODELAY":1},"scope_id":3,'
        b'"ts_recent":654321,"version":1}'),
    "mapped": Image(
        bytes.fromhex(
            "080110d209180a20012806300138a84640c0b8024802500058005800588080fcff0f58c081880860006000608080fcff0f60"
            "c6e790136a0a08001000180020002800721d0880a8051080800818002000280130a0c21e3801980101a8014dc00105"),
        bytes.fromhex(
            "19435654065546512d000000080510e807180a2088272807300738b40b400848c0c407600368e7077080f6037880f6038001"
            "88fd038801e80768656c6c6f696e2d666c6967687454"),
        b'{"congestion":{"rto_us":204000,"rtt_us":200,"rttvar_us":50,"snd_cwnd":10,"snd_ssthresh":2147483647},'
        b'"options":{"IP_TTL":33,"TCP_CONGESTION":"cubic","TCP_NODELAY":1},"scope_id":0,"ts_recent":654321,"ve'
        b'rsion":1}'),
}


@given(states())
def test_a_state_survives(state: ConnectionState) -> None:
    assert decode(encode(state)) == state


@pytest.mark.parametrize("name", CASES)
def test_every_family_survives(name: str) -> None:
    assert decode(encode(CASES[name], inode=1234)) == CASES[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_format_has_not_drifted(name: str) -> None:
    assert encode(CASES[name], inode=1234) == GOLDEN[name]
    assert decode(GOLDEN[name]) == CASES[name]


SWITCHES = ("SO_REUSEADDR", "SO_REUSEPORT", "SO_KEEPALIVE", "SO_DONTROUTE", "IP_FREEBIND", "SO_OOBINLINE",
            "SO_BUF_LOCK", "SO_RCVLOWAT", "SO_SNDBUF", "SO_RCVBUF", "SO_BROADCAST", "SO_NO_CHECK", "SO_PASSCRED",
            "SO_PASSSEC", "IPV6_V6ONLY")  # never negative


@pytest.mark.parametrize("option", [row for row in TABLE if row.form is Form.INT], ids=lambda row: row.name)
def test_every_number_that_a_kernel_can_tell_survives(option: Any) -> None:
    """getsockopt gives an int: a mark of 0x80000000 or more, and -1 for "none", are negative."""
    switch = option.name in SWITCHES or option.name.startswith("TCP_KEEP")
    state = replace(CASES["v6"], options=OPTIONS | {option.name: 1 if switch else -1})
    assert decode(encode(state)) == state


def test_a_linger_time_without_end_survives() -> None:
    """SO_LINGER {1, -1} is kept by the kernel and told as it was."""
    state = replace(CASES["v4"], options=OPTIONS | {"SO_LINGER": (1, -1)})
    assert decode(encode(state)) == state


def test_a_filter_is_in_crius_form() -> None:
    """criu/sk-inet.c packs each instruction into a number: code, jt, jf, k from its highest digits down."""
    state = replace(CASES["v4"], options=OPTIONS | {"SO_ATTACH_FILTER": "15000102c8000000" "06000000ffff0000"})
    image = encode(state)
    entry = criu.messages().inet_sk.FromString(image.inet_sk)
    assert list(entry.opts.so_filter) == [0x0015_01_02_000000C8, 0x0006_00_00_0000FFFF]
    assert decode(image) == state


@pytest.mark.parametrize("name", CASES)
def test_crius_own_loader_reads_the_stream(name: str) -> None:
    images = criu._import("pycriu.images")
    state = CASES[name]
    loaded = images.load(io.BytesIO(encode(state).tcp_stream))
    assert loaded["magic"] == "TCP_STREAM"
    (entry,) = loaded["entries"]
    queues = entry.pop("extra")
    assert base64.b64decode(queues["inq"]) == state.received
    assert base64.b64decode(queues["outq"]) == state.outgoing
    negotiated, window = state.negotiated, state.window
    expected = {
        "inq_len": len(state.received), "inq_seq": state.rcv_nxt, "outq_len": len(state.outgoing),
        "outq_seq": state.write_seq, "unsq_len": state.unsent, "mss_clamp": negotiated.mss_clamp,
        "snd_wscale": negotiated.snd_wscale, "rcv_wscale": negotiated.rcv_wscale,
        "snd_wl1": window.snd_wl1, "snd_wnd": window.snd_wnd, "max_window": window.max_window,
        "rcv_wnd": window.rcv_wnd, "rcv_wup": window.rcv_wup}
    if state.timestamp is not None:
        expected["timestamp"] = state.timestamp
    mask = entry.pop("opt_mask")
    # TCPI_OPT_TIMESTAMPS 1, SACK 2, WSCALE 4, ECN 8 (linux/tcp.h), as a number or as CRIU spells it
    bits = {1: negotiated.timestamps, 2: negotiated.sack, 4: negotiated.wscale, 8: negotiated.ecn}
    assert (int(mask, 0) if isinstance(mask, str) else mask) == sum(bit for bit, holds in bits.items() if holds)
    assert entry == expected


@pytest.mark.parametrize("name", CASES)
def test_the_socket_entry_says_what_criu_wants_to_know(name: str) -> None:
    state = CASES[name]
    entry = criu.messages().inet_sk.FromString(encode(state, inode=77).inet_sk)
    assert (entry.type, entry.proto, entry.state, entry.ino) == (1, 6, int(state.tcp_state), 77)
    assert entry.family == {"v6": 10, "mapped": 10}.get(name, 2)
    assert (entry.src_port, entry.dst_port) == (state.flow.local.port, state.flow.peer.port)
    words = {"v4": b"\xc0\0\2\1", "v6": bytes.fromhex("20010db8000000000000000000000001"),
             "mapped": b"\0" * 10 + b"\xff\xff\xc0\0\2\1"}
    assert struct.pack(f"={len(entry.src_addr)}I", *entry.src_addr) == words.get(name, words["v4"])
    assert bool(entry.flags & 0o4000) == state.nonblocking
    assert (entry.opts.so_sndbuf, entry.opts.so_linger, entry.opts.tcp_keepidle) == (87040, 5, 77)
    assert (entry.opts.so_rcv_tmo_sec, entry.opts.so_rcv_tmo_usec, entry.opts.reuseaddr) == (1, 500000, True)


def stream_with(**changes: Any) -> bytes:
    """The tcp-stream image of the plain state with fields of its entry changed."""
    good = encode(CASES["v4"]).tcp_stream
    length = struct.unpack_from("=I", good, 8)[0]
    entry = criu.messages().tcp_stream.FromString(good[12:12 + length])
    for name, value in changes.items():
        setattr(entry, name, value)
    body = entry.SerializePartialToString()
    return good[:8] + struct.pack("=I", len(body)) + body + good[12 + length:]


def sk_with(**changes: Any) -> bytes:
    entry = criu.messages().inet_sk.FromString(encode(CASES["v4"]).inet_sk)
    for name, value in changes.items():
        if isinstance(value, list):
            entry.ClearField(name)
            getattr(entry, name).extend(value)
        else:
            *path, last = name.split(".")
            setattr(getattr(entry, path[0]) if path else entry, last, value)
    return bytes(entry.SerializeToString())


def extras_with(**changes: Any) -> bytes:
    return json.dumps(json.loads(encode(CASES["v4"]).extras) | changes).encode()


def refuses(**changes: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(replace(encode(CASES["v4"]), **changes))


def test_the_helpers_make_good_images() -> None:
    assert decode(Image(sk_with(), stream_with(), extras_with())) == CASES["v4"]


@pytest.mark.parametrize("changes", [
    {"inq_len": 6}, {"inq_len": 4}, {"inq_len": 0xFFFFFFFF}, {"outq_len": 11}, {"outq_len": 0},
    {"outq_len": 0xFFFFFFFF},
    {"inq_len": 0xFFFFFFFF, "outq_len": 16}, {"snd_wscale": 15}, {"rcv_wscale": 15}, {"rcv_wscale": 0xFFFFFFFF},
    {"unsq_len": 11}, {"unsq_len": 0xFFFFFFFF}, {"mss_clamp": 0}, {"mss_clamp": 47}, {"mss_clamp": 65536},
    {"rcv_wup": 1001}, {"snd_wl1": 1000 + 65161}, {"opt_mask": 6}], ids=repr)
def test_a_stream_that_lies_is_refused(changes: dict[str, int]) -> None:
    refuses(tcp_stream=stream_with(**changes))


@pytest.mark.parametrize("changes", [
    {"family": 1}, {"family": 0}, {"type": 2}, {"proto": 17}, {"proto": 262}, {"state": 10}, {"state": 0},
    {"state": 99},
    {"src_port": 0}, {"dst_port": 0}, {"src_port": 65536}, {"src_addr": []}, {"family": 10}, {"ifname": "x" * 1000}],
    ids=lambda changes: repr(changes)[:40])
def test_a_socket_that_is_no_connection_is_refused(changes: dict[str, Any]) -> None:
    refuses(inet_sk=sk_with(**changes))


CONGESTION = {"snd_cwnd": 10, "snd_ssthresh": 1, "rtt_us": 1, "rttvar_us": 1, "rto_us": 1}


@pytest.mark.filterwarnings("ignore:Unexpected end-group tag")
@pytest.mark.parametrize("more", [b"\x04", b"\x0c", b"\x7c" + b"x" * 50, b"\x28\x01"], ids=repr)
def test_an_entry_that_ends_before_its_bytes_do_is_refused(more: bytes) -> None:
    """The end of a group, which protobuf takes for the end of all; and a field again."""
    good = encode(CASES["v4"]).tcp_stream
    length = struct.unpack_from("=I", good, 8)[0]
    refuses(tcp_stream=good[:8] + struct.pack("=I", length + len(more)) + good[12:12 + length] + more
            + good[12 + length:])
    refuses(inet_sk=sk_with() + more)


@pytest.mark.parametrize("changes", [
    {"version": 2}, {"version": None}, {"version": "1"}, {"more": 1},
    {"ts_recent": None}, {"ts_recent": True}, {"ts_recent": "1"}, {"ts_recent": -1}, {"ts_recent": 1 << 32},
    {"ts_recent": 1.0}, {"scope_id": -1}, {"scope_id": "3"}, {"scope_id": True}, {"scope_id": None}, {"scope_id": 2.5},
    {"scope_id": 1 << 32}, {"congestion": {}}, {"congestion": []}, {"congestion": CONGESTION | {"more": 1}},
    {"congestion": CONGESTION | {"rto_us": "1"}}, {"congestion": CONGESTION | {"snd_cwnd": True}},
    {"congestion": CONGESTION | {"snd_cwnd": -1}}, {"congestion": CONGESTION | {"rtt_us": None}},
    {"congestion": CONGESTION | {"rtt_us": 1 << 70}}, {"congestion": CONGESTION | {"rtt_us": [1]}},
    {"options": []}, {"options": None}, {"options": {"SO_UNKNOWN": 1}}, {"options": {"SO_KEEPALIVE": 1}},
    {"options": {"TCP_NODELAY": True}}, {"options": {"TCP_NODELAY": "1"}}, {"options": {"TCP_NODELAY": 1.0}},
    {"options": {"TCP_NODELAY": [1]}}, {"options": {"TCP_NODELAY": None}}, {"options": {"TCP_NODELAY": 1 << 40}},
    {"options": {"TCP_CONGESTION": 1}}, {"options": {"TCP_CONGESTION": "x" * 65}},
    {"options": {"TCP_CONGESTION": "a\0b"}}, {"options": {"TCP_CONGESTION": "a/b"}},
    {"options": {"TCP_CONGESTION": "a b"}}, {"options": {"TCP_CONGESTION": "\u00e4"}},
    {"options": {"TCP_CONGESTION": "\udc80"}}, {"options": dict.fromkeys(map(str, range(10000)), 1)}],
    ids=lambda changes: repr(changes)[:60])
def test_extras_that_are_not_ours_are_refused(changes: dict[str, Any]) -> None:
    refuses(extras=extras_with(**changes))


@pytest.mark.parametrize("text", [b"", b"{", b"null", b"[]", b"1", b'"x"', b"\xff", b"[" * 20000, b'{"a":' * 20000],
                         ids=lambda text: repr(text[:6]))
def test_extras_that_are_not_json_are_refused(text: bytes) -> None:
    refuses(extras=text)


def test_extras_that_are_too_long_are_not_even_read() -> None:
    """As JSON they could be fifty times their size in memory."""
    nested = extras_with()[:-1] + b',"more":[' + b"[],[]," * (1 << 20) + b"[]]}"
    tracemalloc.start()
    try:
        refuses(extras=nested)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", [
    b"", b"\0" * 12, b"\0" * 200, struct.pack("=III", 0x54564319, 0x51465443, 0xFFFFFFFF) + b"x" * 100])
def test_streams_that_are_no_images_are_refused(text: bytes) -> None:
    refuses(tcp_stream=text)
    refuses(inet_sk=text)


@given(st.sampled_from(sorted(CASES)), st.sampled_from(["inet_sk", "tcp_stream", "extras"]), st.data())
def test_damage_is_refused_or_a_sound_state(name: str, part: str, data: st.DataObject) -> None:
    image = encode(CASES[name])
    damaged = bytearray(getattr(image, part))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert"])):
            case "set":
                damaged[position] = data.draw(st.integers(0, 255))
            case "cut":
                del damaged[position:]
            case "insert":
                damaged.insert(position, data.draw(st.integers(0, 255)))
        if not damaged:
            break
    try:
        state = decode(replace(image, **{part: bytes(damaged)}))
    except ProtocolError:
        return
    assert decode(encode(state)) == state


@given(st.binary(max_size=200), st.binary(max_size=200), st.binary(max_size=200))
def test_noise_is_refused(one: bytes, two: bytes, three: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(Image(one, two, three))


@pytest.mark.parametrize("value", [0, 1, "", None, []])
def test_whether_our_fin_was_sent_is_true_or_false(value: Any) -> None:
    image = encode(plain(options=OPTIONS))
    with pytest.raises(ProtocolError, match="fin_unsent"):
        decode(replace(image, extras=json.dumps({**json.loads(image.extras), "fin_unsent": value}).encode()))


def test_a_fin_is_counted_as_criu_counts_it() -> None:
    """In the sequence numbers, not in the lengths of the queues (CRIU, soccr/soccr.c, refresh_sk)."""
    state = plain(options=OPTIONS, tcp_state=TcpState.CLOSING, fin_unsent=True, rcv_nxt=1000, write_seq=5000)
    stream, received, outgoing = decode_stream(encode(state).tcp_stream)
    assert (stream.inq_seq, stream.outq_seq) == (1000, 5000)
    assert (stream.inq_len, stream.outq_len, stream.unsq_len) == (5, 10, 3) == (len(received), len(outgoing), 3)
    assert decode(encode(state)) == state


def test_a_fin_that_was_not_acknowledged_yet_survives() -> None:
    state = plain(options=OPTIONS, tcp_state=TcpState.CLOSE_WAIT, window=Window(998, 1, 1, 100, 999))
    assert decode(encode(state)) == state
