"""One connection over loopback, of which one end is read, ended and re-created on the same host: the kernel's half of a
pass without anything else of it. For tests that are in a network namespace of their own."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from criu_tcpcp.core import tcp
from criu_tcpcp.core.endpoint import Flow
from criu_tcpcp.core.restoreplan import Step, activation_steps, clock_steps, dormant_steps
from criu_tcpcp.core.state import ConnectionState
from criu_tcpcp.kernel import netns, repair, sockopt, tcpinfo
from criu_tcpcp.kernel.rawpacket import ACK, FIN, RST, Injector, build_segment
from criu_tcpcp.kernel.rules import MARK
from criu_tcpcp.kernel.tap import Sniffer
from criu_tcpcp.kernel.timestamps import learn_ts_recent
from waiting import until

FAMILIES = ["v4", "v6", "mapped"]
OURS = ("10.8.0.1", "fd08::1")


@contextlib.contextmanager
def private_loopback() -> Iterator[None]:
    """A network namespace of its own, which has nothing but a loopback of the size of an Ethernet, with an address that
    looks like one of an Ethernet, too (`OURS`)."""
    orders = ["link set lo mtu 1500", "link set lo up", f"address add {OURS[0]} dev lo",
              f"address add {OURS[1]} dev lo nodad"]
    with netns.private():
        subprocess.run(["ip", "-batch", "-"], input="\n".join(orders) + "\n", text=True, check=True)
        until(lambda: hears(OURS[1]), "the address to be there")
        yield


def hears(address: str) -> bool:
    """A packet comes to it: an IPv6 address works a little later than it is added (net/ipv6/addrconf.c,
    addrconf_dad_work)."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.settimeout(0.05)
        sock.bind((address, 0))
        sock.sendto(b"x", sock.getsockname())
        return sock.recv(1) == b"x"
    return False


def leads_to(address: str) -> bool:
    """There is a route, which comes as late."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        return sock.connect_ex((address, 9)) == 0


def timestamps(on: bool) -> None:
    with open("/proc/sys/net/ipv4/tcp_timestamps", "w") as file:
        file.write(str(int(on)))


def window_scaling(on: bool) -> None:
    with open("/proc/sys/net/ipv4/tcp_window_scaling", "w") as file:
        file.write(str(int(on)))


def pair(family: str, ipv4: str = "127.0.0.1", ipv6: str = "::1") -> tuple[socket.socket, socket.socket]:
    """(the end that moves, its peer), connected over loopback."""
    kind, address = (socket.AF_INET, ipv4) if family == "v4" else (socket.AF_INET6, ipv6)
    with socket.socket(kind, socket.SOCK_STREAM) as listener:
        if family == "mapped":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            address = "::"
        listener.bind((address, 0))
        listener.listen()
        port = listener.getsockname()[1]
        peer = socket.create_connection((ipv4 if family == "mapped" else address, port), 10)
        moving, _ = listener.accept()
    for one in (moving, peer):
        one.settimeout(10)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return moving, peer


@contextlib.contextmanager
def deaf(flow: Flow) -> Iterator[Callable[[], None]]:
    """The moving end does not hear its peer, as under a hold; what the tool makes by hand gets through. Yields what
    ends it early."""
    rule = f"meta mark != {MARK:#x} tcp sport {flow.peer.port} tcp dport {flow.local.port} drop"
    table = f"table inet deaf {{ chain input {{ type filter hook input priority 0; {rule}; }}; }}"
    subprocess.run(["nft", "-f", "-"], input=table, text=True, check=True)
    stands = True

    def hear() -> None:
        nonlocal stands
        if stands:
            subprocess.run(["nft", "delete", "table", "inet", "deaf"], check=True)
        stands = False

    try:
        yield hear
    finally:
        hear()


@dataclass(frozen=True)
class Seen:
    flags: int
    sequence: int
    window: int  # as on the wire: scaled
    payload: int
    stamps: tuple[int, int] | None


class Tap:
    """Every segment that leaves the moving end, by a packet socket of the test's own."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self._socket.setblocking(False)

    def take(self) -> list[Seen]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, address = self._socket.recvfrom(70000)
                if address[2] != 4:  # PACKET_OUTGOING: loopback shows everything twice
                    continue
                head = (data[0] & 15) * 4 if data[0] >> 4 == 4 else 40
                if (data[9] if data[0] >> 4 == 4 else data[6]) != 6:
                    continue
                sport, dport, sequence, _ack, offset, flags, window = struct.unpack_from(">HHIIBBH", data, head)
                if (sport, dport) != (self._flow.local.port, self._flow.peer.port):
                    continue
                options = data[head + 20:head + (offset >> 4) * 4]
                stamps = struct.unpack_from(">II", options, 4) if options[:4] == b"\1\1\10\12" else None
                found.append(Seen(flags, sequence, window, len(data) - head - (offset >> 4) * 4, stamps))
        return found

    def take_but_repeats(self, sent: list[Seen]) -> list[Seen]:
        """As `take`, without the data that lies in one of `sent`: while nothing is acknowledged, the kernel's own timer
        sends the end of a burst again after little more than a jiffy (RFC 8985 7.3), and the peer knows those bytes."""
        return [one for one in self.take() if not one.payload or one.flags & (RST | FIN) or not any(
            0 <= tcp.distance(one.sequence, before.sequence) <= before.payload - one.payload for before in sent)]

    def first_within(self, timeout_s: float) -> Seen | None:
        """What leaves first, if anything does in that time."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            select.select([self._socket], [], [], left_s)
            if found := self.take():
                return found[0]
        return None

    def close(self) -> None:
        self._socket.close()


def learn(moving: socket.socket, flow: Flow, injector: Injector) -> int:
    sniffer = Sniffer(flow)
    try:
        return learn_ts_recent(moving, flow, sniffer, injector, 0.5)
    finally:
        sniffer.close()


def read(moving: socket.socket, injector: Injector) -> ConnectionState:
    flow = tcpinfo.flow_of(moving)
    moving.settimeout(None)  # as a borrowed socket is: with a time-out, Python would wait where the kernel would not
    stamped = tcpinfo.read(moving).options & tcp.OPT_TIMESTAMPS
    recent = learn(moving, flow, injector) if stamped else None
    assert not stamped or recent
    return repair.read_state(moving, sockopt.read_all(moving), False, recent)


def restore(state: ConnectionState, injector: Injector) -> tuple[socket.socket, repair.Restorer]:
    """Dormant, on the same host."""
    fresh = socket.socket(state.flow.socket_family, socket.SOCK_STREAM)
    restorer = repair.Restorer(fresh, transparent=False, inject=lambda segment: injector.deliver(state.flow, segment))
    try:
        restorer.run(dormant_steps(state))
    except BaseException:
        fresh.close()
        raise
    return fresh, restorer


def alive_steps(state: ConnectionState) -> list[Step]:
    """No rule kept the dormant socket's timers from sending: the clock is ahead of whatever they sent."""
    return [*clock_steps(state, 1000), *activation_steps(state)]


def receive(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = sock.recv(min(size - len(data), 1 << 16))
        assert chunk, f"the end after {len(data)} of {size} bytes"
        data += chunk
    return bytes(data)


def acknowledge_part(flow: Flow, injector: Injector, *, sequence: int, upto: int, stamp: int | None) -> None:
    """An acknowledgement of the peer's that covers only a part of a segment: made here, since a stack does not."""
    injector._send(flow, build_segment(flow.peer, flow.local, sequence=sequence, acknowledgement=upto, flags=ACK,
                                       window=500, timestamps=None if stamp is None else (stamp, 0)))


def right_edge_seen_by(peer: socket.socket) -> int:
    """SND.UNA + SND.WND: up to where it may send."""
    with repair.in_repair(peer):
        window = repair._read_window(peer)
    return tcp.add(repair.window_edges(peer)[1], window.snd_wnd)
