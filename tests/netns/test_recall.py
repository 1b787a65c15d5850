"""A restored connection knows what its sender had learnt of the path, and nothing left the host for that."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

import criu_tcpcp
from criu_tcpcp.core.endpoint import Flow
from criu_tcpcp.core.errors import Refused
from criu_tcpcp.core.state import NOTHING_LEARNT, Congestion, ConnectionState
from criu_tcpcp.kernel import tcpinfo
from criu_tcpcp.kernel.rawpacket import Injector
from criu_tcpcp.kernel.rules import MARK
from criu_tcpcp.kernel.tap import Sniffer
from criu_tcpcp.lab import Lab, Weather
from waiting import until

pytestmark = pytest.mark.root

ROUND_TRIP_MS = 20
BYTES = 3 << 20
FALLBACK_MS = 3000  # TCP_TIMEOUT_FALLBACK, include/net/tcp.h


class Reader:
    """The peer, who reads whatever comes."""

    def __init__(self, sock: socket.socket) -> None:
        self.got = bytearray()
        self._sock = sock
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._sock.recv(1 << 20):
                self.got += data


@contextlib.contextmanager
def taught(lab: Lab, version: int, control: str) -> Iterator[tuple[socket.socket, Reader]]:
    """(a connection of the origin's that has sent much over a path of 20 ms, its peer)."""
    lab.put_relay(Weather(delay_ms=ROUND_TRIP_MS / 2, rate=50e6, queue_ms=20), offload=True)
    address, family = str(lab.origin.address(version)), socket.AF_INET6 if version == 6 else socket.AF_INET
    with contextlib.ExitStack() as stack:
        with lab.origin.enter():
            listener = stack.enter_context(socket.create_server((address, 0), family=family))
        with lab.peer.enter():
            peer = stack.enter_context(socket.create_connection(listener.getsockname()[:2], timeout=10))
        peer.settimeout(None)
        ours = stack.enter_context(listener.accept()[0])
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control.encode())
        reader = Reader(peer)
        for count in (BYTES - 1, 1):  # behind the acknowledgement of the last byte the peer has nothing more to say
            ours.sendall(bytes(count))
            until(lambda: not tcpinfo.unacknowledged_bytes(ours), "all to be acknowledged")
            until(lambda: len(reader.got) >= BYTES - 1, "all to be read")
        yield ours, reader
        peer.shutdown(socket.SHUT_RDWR)


class Deaf:
    """The host does not hear the peer, as under a hold, until it does."""

    def __init__(self, flow: Flow) -> None:
        rule = f"meta mark != {MARK:#x} tcp sport {flow.peer.port} tcp dport {flow.local.port} drop"
        _nft(f"table inet deaf {{ chain input {{ type filter hook input priority 0; {rule}; }}; }}")

    def hear(self) -> None:
        _nft("delete table inet deaf")


def _nft(text: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)


@contextlib.contextmanager
def moved(ours: socket.socket, change: Callable[[ConnectionState], ConnectionState]
          ) -> Iterator[tuple[Congestion, criu_tcpcp.Dormant, Sniffer]]:
    """(what it had learnt, the connection made anew at the same host, what left there since)."""
    state = change(criu_tcpcp.get(ours))
    criu_tcpcp.end(ours)
    with contextlib.closing(Sniffer(state.flow)) as sniffer:
        dormant = criu_tcpcp.create(state)
        try:
            yield state.congestion, dormant, sniffer
        finally:
            dormant.close()


@pytest.mark.parametrize(("control", "version"), [("cubic", 4), ("reno", 6), ("bbr", 4)])
def test_window_round_trip_and_time_out_come_back_without_a_packet(
        lab: Lab, capability: Callable[[str, bool], None], control: str, version: int) -> None:
    with open("/proc/sys/net/ipv4/tcp_available_congestion_control") as known:
        capability(control, control in known.read().split())
    with lab.origin.enter(), taught(lab, version, control) as (ours, peer):
        deaf = Deaf(Flow.of_socket(ours))
        with moved(ours, lambda state: state) as (learnt, dormant, sniffer):
            assert learnt.snd_cwnd > 20
            assert learnt.rtt_us >= ROUND_TRIP_MS * 1000
            now = tcpinfo.read(dormant.sock)
            assert dormant.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") \
                == control.encode()
            assert learnt.snd_cwnd <= now.snd_cwnd <= learnt.snd_cwnd + 6  # each write ends in a short segment
            assert abs(now.rtt_us - learnt.rtt_us) <= 2000
            assert now.rto_us <= max(learnt.rto_us, 3 * learnt.rtt_us) + 20_000
            assert tcpinfo.unacknowledged_bytes(dormant.sock) == 0
            assert sniffer.newest() is None
            deaf.hear()
            alive = criu_tcpcp.activate(dormant)
            alive.sendall(b"and on")
            until(lambda: len(peer.got) == BYTES + 6, "the peer to have read on")
        assert peer.got == bytes(BYTES) + b"and on"


def test_restart_is_what_a_new_socket_believes_until_the_first_acknowledgement(lab: Lab) -> None:
    with lab.origin.enter(), taught(lab, 4, "cubic") as (ours, peer):
        deaf = Deaf(Flow.of_socket(ours))
        with moved(ours, lambda state: replace(state, congestion=NOTHING_LEARNT)) as (_learnt, dormant, _sniffer):
            now = tcpinfo.read(dormant.sock)
            assert (now.snd_cwnd, now.rtt_us, now.rto_us) == (10, 0, FALLBACK_MS * 1000)
            deaf.hear()
            alive = criu_tcpcp.activate(dormant)
            alive.sendall(b"and on")
            until(lambda: not tcpinfo.unacknowledged_bytes(alive), "the acknowledgement")
            assert tcpinfo.read(alive).rto_us < 300_000
        assert peer.got == bytes(BYTES) + b"and on"


def test_with_what_is_in_flight_the_first_acknowledgement_brings_a_sample(lab: Lab) -> None:
    """Of the round trip as it is, though the bytes were sent by the other socket."""
    with lab.origin.enter(), taught(lab, 4, "cubic") as (ours, peer):
        deaf = Deaf(Flow.of_socket(ours))
        ours.sendall(b"in flight")
        with moved(ours, lambda state: replace(state, congestion=NOTHING_LEARNT)) as (_learnt, dormant, _sniffer):
            assert dormant.state.sent == b"in flight"
            deaf.hear()
            alive = criu_tcpcp.activate(dormant)
            until(lambda: not tcpinfo.unacknowledged_bytes(alive), "the acknowledgement")
            assert ROUND_TRIP_MS * 1000 <= tcpinfo.read(alive).rtt_us < 1_000_000
        until(lambda: peer.got == bytes(BYTES) + b"in flight", "all bytes")


def test_a_host_that_takes_no_segment_of_its_own_making_refuses(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that were to be acknowledged stay in the queue: no connection may live with them."""
    with lab.origin.enter(), taught(lab, 4, "cubic") as (ours, _peer):
        Deaf(Flow.of_socket(ours))
        monkeypatch.setattr(Injector, "deliver", lambda *_arguments: None)
        with pytest.raises(Refused, match="does not take a segment"), moved(ours, lambda state: state):
            pass
