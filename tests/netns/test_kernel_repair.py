"""TCP_REPAIR on real connections: what is read and re-created is the same connection, and the peer gets every byte."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from criu_tcpcp.core import tcp
from criu_tcpcp.core.endpoint import Flow
from criu_tcpcp.core.errors import KernelError
from criu_tcpcp.core.options import BY_NAME, TABLE, Form, OptionValue, applying
from criu_tcpcp.core.restoreplan import activation_steps, clock_steps
from criu_tcpcp.core.tcp import TcpState
from criu_tcpcp.kernel import repair, sockopt, tcpinfo
from criu_tcpcp.kernel.rawpacket import Injector
from criu_tcpcp.kernel.rules import MARK, Silence
from criu_tcpcp.kernel.tap import Sniffer
from criu_tcpcp.kernel.timestamps import learn_ts_recent
from endpoints import (
    FAMILIES,
    Tap,
    acknowledge_part,
    alive_steps,
    deaf,
    learn,
    pair,
    private_loopback,
    read,
    receive,
    restore,
    right_edge_seen_by,
    timestamps,
    window_scaling,
)
from waiting import until

pytestmark = pytest.mark.root

RST, SYN = 4, 2


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with private_loopback():
        yield


@pytest.fixture
def injector(request: pytest.FixtureRequest, alone: None) -> Iterator[Injector]:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    made = Injector(6 if parameters.get("family") == "v6" else 4, MARK)
    yield made
    made.close()


def test_nothing_is_read_as_sent_that_never_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the send queue is selected, the pacing timer takes segments for sent without sending them."""
    timestamps(False)
    moving, peer = pair("v4")
    sequence = repair._sequence

    def slowly(sock: socket.socket, queue: int) -> int:
        found = sequence(sock, queue)
        if queue == repair._SEND_QUEUE:
            before = tcpinfo.unsent_bytes(sock)
            until(lambda: tcpinfo.unsent_bytes(sock) < before, "the pacing timer")
        return found

    with moving, peer, deaf(Flow.of_socket(moving)):
        moving.setsockopt(socket.SOL_SOCKET, 47, 100_000)  # SO_MAX_PACING_RATE
        moving.setblocking(False)
        written = moving.send(bytes(200_000))
        monkeypatch.setattr(repair, "_sequence", slowly)
        state = repair.read_state(moving, sockopt.read_all(moving), True, None)
        assert 0 < written - state.unsent <= tcpinfo.unread_bytes(peer)


def test_the_clock_does_not_fall_behind_what_a_paced_sender_put_on_its_last_segment(injector: Injector) -> None:
    """That bears the time at which the next burst may leave."""
    timestamps(True)
    moving, peer = pair("v4")
    flow = Flow.of_socket(moving)
    sniffer = Sniffer(flow)
    with moving, peer, contextlib.closing(sniffer):
        moving.setsockopt(socket.SOL_SOCKET, 47, 10_000)  # SO_MAX_PACING_RATE: seconds between two bursts
        moving.sendall(bytes(60_000))
        moving.settimeout(None)
        options = sockopt.read_all(moving)
        recent = learn_ts_recent(moving, flow, sniffer, injector, 0.5)
        stamps = sniffer.newest()
        assert stamps is not None
        clock = repair.read_state(moving, options, True, recent).timestamp
        assert clock is not None
        assert tcp.distance(stamps[0], clock) > 0, "the kernel does not stamp ahead: this test shows nothing"
        state = repair.read_state(moving, options, True, recent, stamps[0])
        assert state.timestamp == stamps[0] & ~1  # the last bit says in what unit it counts


def count_in_microseconds(on: bool) -> None:
    """As `ip route change ... features tcp_usec_ts` (linux/rtnetlink.h, RTAX_FEATURE_TCP_USEC_TS: 16)."""
    from pyroute2 import IPRoute
    with IPRoute() as route:
        route.route("replace", dst="127.0.0.1", dst_len=32, type="local", table=255, oif=1, scope=254,
                    prefsrc="127.0.0.1", metrics={"features": 16 * on})


@pytest.mark.parametrize("there", [False, True], ids=["plain route there", "same route there"])
def test_a_clock_of_microseconds_goes_on(there: bool, injector: Injector,
                                         capability: Callable[[str, bool], None]) -> None:
    """Whatever the route at the destination says, which connect asks."""
    capability("microsecond timestamps", repair.has_usec_timestamps())
    count_in_microseconds(True)
    moving, peer = pair("v4")
    flow = tcpinfo.flow_of(moving)
    assert tcpinfo.read(moving).options & tcp.OPT_USEC_TS
    tap = Tap(flow)
    with deaf(flow):
        state = read(moving, injector)
        assert state.timestamp is not None
        assert state.timestamp % 2 == 1
        repair.end_silently(moving)
        moving.close()
        count_in_microseconds(there)
        fresh, restorer = restore(state, injector)
        restorer.run([*clock_steps(state, 20), *activation_steps(state)])
    assert tcpinfo.read(fresh).options & tcp.OPT_USEC_TS
    began = time.monotonic()
    for _ in range(5):
        fresh.sendall(b"x")
        assert peer.recv(1) == b"x"
        peer.sendall(b"y")
        assert fresh.recv(1) == b"y"
    took_us = (time.monotonic() - began) * 1e6
    until(lambda: not tcpinfo.unacknowledged_bytes(peer), "the last acknowledgement")
    values = [one.stamps[0] for one in tap.take() if one.stamps]
    assert all(tcp.distance(later, sooner) >= 0 for sooner, later in itertools.pairwise(values))
    assert all(tcp.distance(one, state.timestamp) >= 20_000 for one in values[-5:])
    assert tcpinfo.read(fresh).rtt_us < max(took_us, 1000) + 1000, "an echo was taken for one of another unit"
    fresh.close()
    peer.close()
    tap.close()


@pytest.mark.parametrize("stamps", [True, False], ids=["timestamps", "bare"])
@pytest.mark.parametrize("queues", ["empty", "both full", "partly acknowledged", "unsent"])
@pytest.mark.parametrize("closing", [False, True], ids=["established", "close-wait"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_peer_cannot_tell(family: str, closing: bool, queues: str, stamps: bool, injector: Injector) -> None:
    timestamps(stamps)
    moving, peer = pair(family)
    flow = tcpinfo.flow_of(moving)
    tap = Tap(flow)
    # Both have spoken, and the acknowledgements are in: from here on every byte counts.
    peer.sendall(b"question")
    assert receive(moving, 8) == b"question"
    moving.sendall(b"answer")
    assert receive(peer, 6) == b"answer"
    until(lambda: tcpinfo.unacknowledged_bytes(moving) == 0, "the acknowledgement")
    mss_before = tcpinfo.read(moving).snd_mss
    assert mss_before == (1428 if family == "v6" else 1448) + (0 if stamps else 12)
    unread = b"u" * 5000 if queues == "both full" else b""
    peer.sendall(unread)
    if closing:
        peer.shutdown(socket.SHUT_WR)
        until(lambda: tcpinfo.read(moving).state is TcpState.CLOSE_WAIT, "the FIN")
    until(lambda: tcpinfo.unread_bytes(moving) == len(unread), "the bytes")
    expected = b""
    with deaf(flow) as hear:
        if queues == "both full":
            expected = bytes(range(256)) * 12
        elif queues == "partly acknowledged":
            expected = bytes(range(200)) * 5
        elif queues == "unsent":
            moving.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
            expected = bytes(range(256)) * 300
        moving.sendall(expected)
        if queues == "partly acknowledged":
            until(lambda: select.select([peer], [], [], 0)[0], "it arrives")
            stamp = learn(moving, flow, injector) if stamps else None
            rcv_nxt, write_seq = repair.sequences(moving)
            acknowledge_part(flow, injector, sequence=rcv_nxt, upto=tcp.add(write_seq, -300), stamp=stamp)
            assert tcpinfo.unacknowledged_bytes(moving) == 300
        state = read(moving, injector)
        assert state.tcp_state is (TcpState.CLOSE_WAIT if closing else TcpState.ESTABLISHED)
        assert state.received == unread
        assert state.outgoing == (expected[-300:] if queues == "partly acknowledged" else expected)
        assert (state.unsent > 0) == (queues == "unsent")
        sent = tap.take()
        repair.end_silently(moving)
        moving.close()
        assert tap.take_but_repeats(sent) == []
        fresh, restorer = restore(state, injector)
        restorer.run(alive_steps(state))
        assert not repair.is_in_repair(fresh)
        assert tcpinfo.read(fresh).snd_mss == mss_before
        assert tcpinfo.read(fresh).state is state.tcp_state
        hear()
    fresh.settimeout(10)
    assert receive(fresh, len(unread)) == unread
    if closing:
        assert fresh.recv(1) == b""
    else:
        peer.sendall(b"more" * 1000)
        assert receive(fresh, 4000) == b"more" * 1000
    fresh.sendall(b"the end")
    assert receive(peer, len(expected) + 7) == expected + b"the end"
    fresh.close()
    assert peer.recv(1) == b""
    said = tap.take()
    assert said
    assert not [one for one in said if one.flags & (RST | SYN)]
    assert [one.stamps is not None for one in said] == [stamps] * len(said)
    if stamps:
        assert all(one.stamps is not None and one.stamps[1] for one in said), "a TSecr of 0"
        values = [one.stamps[0] for one in said if one.stamps]
        assert all(tcp.distance(later, sooner) >= 0 for sooner, later in itertools.pairwise(values))
        assert state.timestamp is not None
        assert tcp.distance(values[0], state.timestamp) >= 0, "the clock went back"
    assert restorer.reports == []
    tap.close()
    peer.close()


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_window_that_the_peer_sees_stays(family: str, scaled: bool, injector: Injector) -> None:
    """Also where the handshake had no window scale: this host, which would offer one, must not use one."""
    window_scaling(scaled)
    moving, peer = pair(family)
    window_scaling(True)
    flow = tcpinfo.flow_of(moving)
    peer.sendall(b"question")
    assert receive(moving, 8) == b"question"
    moving.sendall(b"answer")
    assert receive(peer, 6) == b"answer"
    until(lambda: tcpinfo.unacknowledged_bytes(moving) == 0, "the acknowledgement")
    right_edge = right_edge_seen_by(peer)
    with deaf(flow):
        state = read(moving, injector)
        repair.end_silently(moving)
        moving.close()
        fresh, restorer = restore(state, injector)
        restorer.run(alive_steps(state))
    assert state.negotiated.wscale == scaled
    assert tcpinfo.read(fresh).rcv_wscale == state.negotiated.rcv_wscale
    fresh.settimeout(10)
    peer.sendall(b"more")
    assert receive(fresh, 4) == b"more"
    fresh.sendall(b"the end")
    assert receive(peer, 7) == b"the end"
    assert tcp.distance(right_edge_seen_by(peer), right_edge) >= 0
    fresh.close()
    peer.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_more_is_promised_than_the_program_has_room_for(family: str, injector: Injector) -> None:
    """The buffer is large while the queue is filled; a window of that size would have to be taken back. Unsent bytes
    leave in the instant in which they are written, with the first windows that the peer is told."""
    moving, peer = pair(family)
    flow = tcpinfo.flow_of(moving)
    moving.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 30_000)
    peer.sendall(b"q" * 10_000)
    until(lambda: tcpinfo.unread_bytes(moving) == 10_000, "they arrive")
    with deaf(flow):
        moving.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        moving.send(b"answer")
        state = read(moving, injector)
        assert state.unsent == 6
        state = replace(state, options={**state.options, "TCP_CORK": 0})
        repair.end_silently(moving)
        moving.close()
        fresh, restorer = restore(state, injector)
        tap = Tap(flow)
        restorer.run(alive_steps(state))
        said = tap.take()
    assert said
    assert max(one.window << state.negotiated.rcv_wscale for one in said) <= state.options["SO_RCVBUF"]
    tap.close()
    fresh.close()
    peer.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_large_queues_both_ways(family: str, injector: Injector) -> None:
    moving, peer = pair(family)
    flow = tcpinfo.flow_of(moving)
    for one in (moving, peer):
        one.setsockopt(socket.SOL_SOCKET, 32, 4 << 20)  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
        one.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)
    blob = bytes(range(256)) * 4096
    peer.setblocking(False)
    queued = peer.send(blob)
    until(lambda: tcpinfo.unread_bytes(moving) == queued or not tcpinfo.unacknowledged_bytes(peer), "they arrive")
    queued = tcpinfo.unread_bytes(moving)
    with deaf(flow) as hear:
        moving.setblocking(False)
        sent = moving.send(blob)
        state = read(moving, injector)
        assert (len(state.received), len(state.outgoing)) == (queued, sent)
        assert sent > 1 << 19
        repair.end_silently(moving)
        moving.close()
        fresh, restorer = restore(state, injector)
        restorer.run(alive_steps(state))
        hear()
    fresh.settimeout(10)
    peer.settimeout(10)
    assert receive(fresh, queued) == blob[:queued]
    assert receive(peer, sent) == blob[:sent]
    fresh.close()
    peer.close()


def test_reading_changes_nothing(injector: Injector) -> None:
    """Cancelled after the reading, the program goes on with the very socket."""
    moving, peer = pair("v4")
    moving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    moving.setsockopt(socket.SOL_SOCKET, 42, 3)  # SO_PEEK_OFF
    peer.sendall(b"0123456789")
    until(lambda: tcpinfo.unread_bytes(moving) == 10, "the bytes")
    before = sockopt.read_all(moving)
    with deaf(tcpinfo.flow_of(moving)):
        first, second = read(moving, injector), read(moving, injector)
    assert first.received == second.received == b"0123456789"
    assert (first.rcv_nxt, first.write_seq) == (second.rcv_nxt, second.write_seq)
    assert sockopt.read_all(moving) == before
    assert not repair.is_in_repair(moving)
    assert moving.recv(10) == b"0123456789"
    moving.sendall(b"answer")
    assert receive(peer, 6) == b"answer"
    moving.close()
    peer.close()


def test_a_dormant_socket_dies_in_silence(injector: Injector) -> None:
    """The destination may fail at any time before the commit: the origin's connection lives on."""
    moving, peer = pair("v4")
    peer.sendall(b"unread")
    until(lambda: tcpinfo.unread_bytes(moving) == 6, "the bytes")
    tap = Tap(tcpinfo.flow_of(moving))
    with deaf(tcpinfo.flow_of(moving)):
        state = read(moving, injector)
        repair.end_silently(moving)
        moving.close()
        tap.take()
        for _ in range(3):
            fresh, _restorer = restore(state, injector)
            fresh.close()
        again, restorer = restore(state, injector)
        assert tap.take() == []
        restorer.run(alive_steps(state))
    assert again.recv(6) == b"unread"
    again.sendall(b"x")
    assert peer.recv(1) == b"x"
    again.close()
    peer.close()
    tap.close()


@pytest.mark.parametrize("what", ["nothing owed", "a FIN received", "bytes in flight"])
def test_a_dormant_socket_stays_silent(what: str, injector: Injector) -> None:
    """Repair mode stops no timer: a rule has to. Until the commit the origin alone answers the peer, so neither a
    delayed acknowledgement (40 ms) nor a retransmission (1 s) may leave: those that would are awaited."""
    moving, peer = pair("v4")
    flow = tcpinfo.flow_of(moving)
    exchange = b"12345678"
    peer.sendall(exchange)
    assert receive(moving, 8) == exchange
    if what == "a FIN received":
        peer.shutdown(socket.SHUT_WR)
        until(lambda: tcpinfo.read(moving).state is TcpState.CLOSE_WAIT, "the FIN")
    with deaf(flow):
        if what == "bytes in flight":
            moving.sendall(b"x" * 1000)
        state = read(moving, injector)
        repair.end_silently(moving)
        moving.close()
        tap = Tap(flow)
        silence = Silence(flow.ip_version)
        silence.add(flow)
        fresh, _restorer = restore(state, injector)
        assert tap.first_within(1.5 if what == "bytes in flight" else 0.3) is None
        fresh.close()
        assert tap.take() == []
        silence.close()
    tap.close()
    peer.close()


def test_an_owed_acknowledgement_is_sent_at_once(injector: Injector) -> None:
    """The peer's bytes came, their delayed acknowledgement did not leave: after the switch it does, before its RTO."""
    moving, peer = pair("v4")
    flow = tcpinfo.flow_of(moving)
    peer.sendall(b"a" * 100)
    assert receive(moving, 100) == b"a" * 100
    # No delayed acknowledgement on demand: so the acknowledgement is dropped, and the state says that it is owed.
    state = read(moving, injector)
    with deaf(flow) as hear:
        repair.end_silently(moving)
        moving.close()
        state = replace(state, received=b"", window=replace(
            state.window, rcv_wup=tcp.add(state.rcv_nxt, -50), rcv_wnd=state.window.rcv_wnd + 50))
        tap = Tap(flow)
        fresh, restorer = restore(state, injector)
        assert tap.take() == []
        restorer.run(alive_steps(state))
        said = tap.take()
        assert len(said) == 1
        assert said[0].payload == 0
        hear()
    tap.close()
    fresh.close()
    peer.close()


@pytest.mark.parametrize("written", [0, 1, 1000, 20000])
def test_an_activation_that_was_interrupted_goes_on(written: int, injector: Injector) -> None:
    """write_seq tells how many of the unsent bytes are in."""
    moving, peer = pair("v4")
    moving.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
    blob = bytes(range(256)) * 200
    with deaf(tcpinfo.flow_of(moving)) as hear:
        moving.sendall(blob)
        state = read(moving, injector)
        assert state.unsent >= 20000
        repair.end_silently(moving)
        moving.close()
        fresh, restorer = restore(state, injector)
        assert repair.written_since(fresh, state) == 0
        if written:
            assert fresh.gettimeout() is None
            repair.set_repair(fresh, repair.REPAIR_ON)
            repair.set_repair(fresh, repair.REPAIR_OFF_SILENT)
            fresh.sendall(state.unsent_bytes[:written])
        assert repair.written_since(fresh, state) == written
        if not written:
            repair.set_repair(fresh, repair.REPAIR_ON)
        restorer.run(activation_steps(state, written) if written else alive_steps(state))
        hear()
    assert receive(peer, len(blob)) == blob
    fresh.close()
    peer.close()


# -- options -----------------------------------------------------------------------------------------------------------

#: A value that no fresh socket has; getsockopt's own form.
UNUSUAL: dict[str, OptionValue] = {
    "SO_BINDTODEVICE": "lo", "IP_FREEBIND": 1, "SO_MARK": 7, "SO_PRIORITY": 5, "SO_DONTROUTE": 1, "SO_RCVLOWAT": 3,
    "SO_RCVTIMEO": (3, 500000), "SO_SNDTIMEO": (4, 0), "SO_LINGER": (1, 9), "SO_OOBINLINE": 1, "SO_KEEPALIVE": 1,
    "TCP_KEEPIDLE": 111, "TCP_KEEPINTVL": 22, "TCP_KEEPCNT": 3, "SO_REUSEPORT": 1, "SO_TIMESTAMP": 1,
    "SO_TIMESTAMPNS": 1, "SO_MAX_PACING_RATE": 12345678901, "TCP_CONGESTION": "reno", "TCP_NODELAY": 1, "TCP_CORK": 1,
    "TCP_SYNCNT": 3, "TCP_LINGER2": 17, "TCP_THIN_LINEAR_TIMEOUTS": 1, "TCP_USER_TIMEOUT": 12345,
    "TCP_NOTSENT_LOWAT": 16384, "IP_TOS": 0x28, "IP_TTL": 33, "IP_MTU_DISCOVER": 3, "IP_PKTINFO": 1, "IP_RECVTTL": 1,
    "IP_RECVTOS": 1, "IPV6_UNICAST_HOPS": 44, "IPV6_TCLASS": 0x28, "IPV6_MTU_DISCOVER": 3, "IPV6_RECVPKTINFO": 1,
    "SO_PEEK_OFF": 4, "SO_SNDBUF": 100000, "SO_RCVBUF": 120000, "SO_BUF_LOCK": 3, "SO_REUSEADDR": 1,
    "SO_DEBUG": 1, "SO_BROADCAST": 1, "SO_NO_CHECK": 1, "SO_PASSCRED": 1, "SO_PASSSEC": 1, "SO_TIMESTAMPING": (0x98, 0),
    "SO_TIMESTAMP_NEW": 1, "SO_TIMESTAMPNS_NEW": 1, "SO_TIMESTAMPING_NEW": (0x98, 0), "SO_TXTIME": (1, 1),
    "SO_SELECT_ERR_QUEUE": 1, "SO_BUSY_POLL": 50, "SO_PREFER_BUSY_POLL": 1, "SO_TXREHASH": 0, "SO_RESERVE_MEM": 8192,
    "SO_ATTACH_FILTER": "b100000000000000" "06000000ffff0000", "SO_LOCK_FILTER": 1, "TCP_INQ": 1, "TCP_TX_DELAY": 700,
    "TCP_RTO_MAX_MS": 50000, "TCP_RTO_MIN_US": 100000, "TCP_DELACK_MAX_US": 100000, "TCP_WINDOW_CLAMP": 40000,
    "TCP_QUICKACK": 0, "IP_OPTIONS": "01010100", "IP_RECVERR": 1, "IP_MINTTL": 3, "IP_BIND_ADDRESS_NO_PORT": 1,
    "IPV6_RECVERR": 1, "IPV6_MINHOPCOUNT": 3, "IPV6_AUTOFLOWLABEL": 0, "IPV6_RECVHOPLIMIT": 1, "IPV6_RECVTCLASS": 1,
    "IPV6_FLOWINFO": 1, "IPV6_2292PKTINFO": 1, "IPV6_2292HOPLIMIT": 1}


#: Of a socket that is bound already it cannot be set.
SET_EARLY = {"IPV6_V6ONLY"}


def test_every_option_has_an_unusual_value_here() -> None:
    assert set(UNUSUAL) | SET_EARLY == {option.name for option in TABLE}


def set_plainly(sock: socket.socket, name: str, value: OptionValue) -> None:
    """As a program would: by setsockopt, knowing nothing of the table but the number."""
    option = BY_NAME[name]
    if option.form is Form.FILTER and isinstance(value, str):
        program = ctypes.create_string_buffer(bytes.fromhex(value))
        sock.setsockopt(option.level, option.number,
                        struct.pack("@HP", len(value) // 16, ctypes.addressof(program)))
    elif isinstance(value, str):
        packed = bytes.fromhex(value) if option.form is Form.BYTES else value.encode()
        sock.setsockopt(option.level, option.number, packed)
    elif isinstance(value, tuple):
        packed = struct.pack("=qq" if option.form is Form.TIMEVAL else "=ii", *value)
        sock.setsockopt(option.level, option.number, packed)
    elif option.form is Form.LONG:
        sock.setsockopt(option.level, option.number, struct.pack("=Q", value))
    else:
        sock.setsockopt(option.level, option.number, value // 2 if name in ("SO_SNDBUF", "SO_RCVBUF") else value)


@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_option_comes_back(family: str, name: str, injector: Injector,
                              capability: Callable[[str, bool], None]) -> None:
    moving, peer = pair(family)
    if BY_NAME[name] not in applying(moving.family):
        moving.close()
        peer.close()
        return
    usual = sockopt.read_all(moving)
    with moving, peer:
        capability(name, name in usual)
        try:
            set_plainly(moving, name, UNUSUAL[name])
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            capability(name, False)
        assert sockopt.read(moving, BY_NAME[name]) == UNUSUAL[name]
        if name not in ("TCP_NODELAY", "TCP_QUICKACK"):
            assert usual[name] != UNUSUAL[name], "not unusual"
        with deaf(tcpinfo.flow_of(moving)):
            state = read(moving, injector)
            wanted = dict(state.options)
            repair.end_silently(moving)
            moving.close()
            fresh, restorer = restore(state, injector)
            restorer.run(alive_steps(state))
        with fresh:
            assert restorer.reports == []
            assert sockopt.read_all(fresh) == wanted


def set_default_of_new_sockets(only_ipv6: bool) -> None:
    with open("/proc/sys/net/ipv6/bindv6only", "w") as file:
        file.write(str(int(only_ipv6)))


@pytest.mark.parametrize("there", [False, True], ids=["there usual", "there only v6"])
@pytest.mark.parametrize("here", [False, True], ids=["here usual", "here only v6"])
@pytest.mark.parametrize("family", ["v6", "mapped"])
def test_a_host_may_have_another_idea_of_v6only(family: str, here: bool, there: bool, injector: Injector) -> None:
    """Where it is the default, no socket could be bound to a v4-mapped address."""
    set_default_of_new_sockets(here)
    moving, peer = pair(family)
    set_default_of_new_sockets(there)
    with deaf(tcpinfo.flow_of(moving)):
        state = read(moving, injector)
        assert state.options["IPV6_V6ONLY"] == (family == "v6")  # a bind to one address makes it so
        repair.end_silently(moving)
        moving.close()
        fresh, restorer = restore(state, injector)
        restorer.run(alive_steps(state))
    assert sockopt.read_all(fresh) == state.options
    fresh.close()
    peer.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untouched_socket_keeps_every_default(family: str, injector: Injector) -> None:
    """Above all the buffers' autotuning, which setting a size ends."""
    moving, peer = pair(family)
    before = sockopt.read_all(moving)
    with deaf(tcpinfo.flow_of(moving)):
        state = read(moving, injector)
        repair.end_silently(moving)
        moving.close()
        fresh, restorer = restore(state, injector)
        restorer.run(alive_steps(state))
    assert sockopt.read_all(fresh) == before
    assert restorer.reports == []
    fresh.close()
    peer.close()


# -- ends --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("full", [False, True], ids=["empty", "queues full"])
@pytest.mark.parametrize("way", ["silently", "as eof"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_endpoint_ends_without_a_packet(family: str, way: str, full: bool) -> None:
    moving, peer = pair(family)
    flow = tcpinfo.flow_of(moving)
    tap = Tap(flow)
    sent = []
    with deaf(flow):
        if full:
            moving.sendall(b"x" * 5000)
            until(lambda: select.select([peer], [], [], 0)[0], "they leave")
            sent = tap.take()
        ours = moving.dup()  # the tool's copy of the program's socket
        (repair.end_silently if way == "silently" else repair.end_as_eof)(ours)
        ours.close()
        assert not repair.is_in_repair(moving)
        if way == "as eof":
            assert moving.recv(10) == b""
            with pytest.raises(OSError):
                moving.send(b"x", socket.MSG_NOSIGNAL)
        else:
            with pytest.raises(ConnectionAbortedError):
                moving.recv(10)
            with pytest.raises((BrokenPipeError, OSError)):
                moving.send(b"x", socket.MSG_NOSIGNAL)
        moving.close()
        assert tap.take_but_repeats(sent) == []
        if full:
            assert receive(peer, 5000) == b"x" * 5000
        peer.setblocking(False)
        with pytest.raises(BlockingIOError):
            peer.recv(1)
    tap.close()
    peer.close()


def test_repair_needs_a_connection() -> None:
    with socket.socket() as unconnected, pytest.raises(KernelError, match="getpeername"):
        tcpinfo.flow_of(unconnected)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(KernelError, match="TCP_REPAIR"):
        repair.set_repair(listener, repair.REPAIR_ON)


def test_urgent_data_is_seen() -> None:
    moving, peer = pair("v4")
    assert not tcpinfo.has_urgent_data(moving)
    peer.send(b"!", socket.MSG_OOB)
    until(lambda: tcpinfo.has_urgent_data(moving), "it arrives")
    moving.close()
    peer.close()
