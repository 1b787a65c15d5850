"""The matrix of states: in which state an endpoint is, what its queues hold, and what the handshake settled; each cell
is made on a real connection, passed by the kernel's half of a pass, and used to its end."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from closing import until_closed
from criu_tcpcp import inventory, verify
from criu_tcpcp.core import tcp
from criu_tcpcp.core.endpoint import Flow
from criu_tcpcp.core.errors import Refused
from criu_tcpcp.core.restoreplan import InjectSegment, activation_steps, clock_steps
from criu_tcpcp.core.state import ConnectionState
from criu_tcpcp.core.tcp import TcpState
from criu_tcpcp.kernel import repair, sockopt, tcpinfo
from criu_tcpcp.kernel.rawpacket import Injector
from criu_tcpcp.kernel.rules import MARK, Silence
from criu_tcpcp.kernel.timestamps import pay_acknowledgement
from criu_tcpcp.verify import builder
from endpoints import FAMILIES, OURS, acknowledge_part, learn, pair, receive, restore
from waiting import until

S = TcpState
STATES = (S.ESTABLISHED, S.CLOSE_WAIT, S.FIN_WAIT1, S.FIN_WAIT2, S.CLOSING, S.LAST_ACK)
RECEIVED = ("empty", "some", "full")
OUTGOING = ("empty", "in flight", "partly acknowledged", "unsent", "zero window", "corked")
SYSCTLS = {"timestamps": "tcp_timestamps", "sack": "tcp_sack", "scaling": "tcp_window_scaling", "ecn": "tcp_ecn"}
_SO_SNDBUFFORCE, _SO_ATTACH_FILTER = 32, 26
_ENDS_S = 10


@dataclass(frozen=True)
class Cell:
    """`received`: "full" is up to a zero window, or, where a FIN has followed, nearly so."""

    state: TcpState
    received: str
    outgoing: str
    timestamps: bool
    sack: bool
    scaling: bool
    ecn: bool
    family: str

    def __str__(self) -> str:
        without = "".join(f" no {name}" for name in ("timestamps", "sack", "scaling") if not getattr(self, name))
        return (f"{self.state.label} in {self.received} out {self.outgoing} {self.family}{without}"
                f"{' ecn' if self.ecn else ''}")

    def settle(self) -> None:
        """What this network namespace agrees to in a handshake."""
        for name, file in SYSCTLS.items():
            with open(f"/proc/sys/net/ipv4/{file}", "w") as settings:
                settings.write(str(int(getattr(self, name))))

    @property
    def ip_version(self) -> int:
        return 6 if self.family == "v6" else 4

    @property
    def fin_received(self) -> bool:
        return self.state in tcp.FIN_RECEIVED_STATES

    @property
    def fin_queued(self) -> bool:
        return self.state in tcp.FIN_QUEUED_STATES

    @property
    def can_be(self) -> bool:
        """An acknowledged FIN has nothing in front of it, and a cork does not hold what stands in front of a FIN."""
        return not (self.state is S.FIN_WAIT2 and self.outgoing != "empty") \
            and not (self.fin_queued and self.outgoing == "corked")


class Recorder:
    """Every packet of this network namespace, as a capture at the peer would have it: without what the tool makes by
    hand, which never is on a wire."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE
        mark_at = 0xFFFFF000 + 20  # SKF_AD_OFF + SKF_AD_MARK (linux/filter.h)
        program = b"".join(struct.pack("HBBI", *one) for one in (
            (0x20, 0, 0, mark_at), (0x15, 0, 1, MARK), (0x06, 0, 0, 0), (0x06, 0, 0, 0x40000)))
        buffer = ctypes.create_string_buffer(program)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER,
                                struct.pack("HL", 4, ctypes.addressof(buffer)))
        self._socket.setblocking(False)
        self._socket.bind(("lo", 3))
        self._records: list[tuple[int, bytes, int]] = []

    def collect(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, address = self._socket.recvfrom(1 << 17)
                if address[2] == 4:  # PACKET_OUTGOING: loopback shows everything twice
                    self._records.append((time.time_ns(), data, len(data)))

    def packets_from(self, flow: Flow) -> int:
        """How many segments have left the local end."""
        return sum(packet.src == flow.local for packet in self.capture().packets)

    def capture(self) -> verify.Capture:
        self.collect()
        return verify.parse(builder.pcap(self._records, link_type=101), "peer.pcap", verify.Role.PEER)

    def close(self) -> None:
        self._socket.close()


class Wall:
    """Packets of the flow that are lost: of the peer's from `deafen`, of ours from `mute`; none of the tool's. The
    peer's acknowledgements are lost before a capture sees them, or it would seem to have heard what it has not; its FIN
    behind, since a stack takes a packet that could not leave for unsent."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._stands = False

    def deafen(self) -> None:
        self._drop("output", self._flow.peer.port, self._flow.local.port, "tcp flags & fin == 0")
        self._drop("input", self._flow.peer.port, self._flow.local.port)

    def mute(self) -> None:
        self._drop("input", self._flow.local.port, self._flow.peer.port)

    def _drop(self, hook: str, sport: int, dport: int, more: str = "") -> None:
        table = (f"table inet wall {{ chain {hook} {{ type filter hook {hook} priority 0; "
                 f"meta mark != {MARK:#x} tcp sport {sport} tcp dport {dport} {more} drop; }}; }}")
        subprocess.run(["nft", "-f", "-"], input=table, text=True, check=True)
        self._stands = True

    def fall(self) -> None:
        if self._stands:
            subprocess.run(["nft", "delete", "table", "inet", "wall"], check=True)
        self._stands = False


def blob(size: int) -> bytes:
    """Each four bytes say where they are."""
    return struct.pack(f">{(size + 3) // 4}I", *range((size + 3) // 4))[:size]


class Play:
    """One cell, from the handshake to the last acknowledgement. `sizes`: of what is written, in bytes."""

    sizes: ClassVar[dict[str, int]] = {"in flight": 3000, "partly acknowledged": 1000, "unsent": 100_000, "corked": 100}

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        cell.settle()
        self.recorder = Recorder()
        self.injector = Injector(cell.ip_version, MARK)
        self.moving, self.peer = pair(cell.family, *OURS)
        self.flow = tcpinfo.flow_of(self.moving)
        self.wall = Wall(self.flow)
        self.silence = contextlib.ExitStack()
        self.to_us, self.to_peer = b"", b""  # what either program still has to read
        self.fin_unsent = False
        self.beyond = b""  # what the peer has written, and cannot send yet

    # -- how it comes to be --------------------------------------------------------------------------------------------

    def arrange(self) -> None:
        cell, moving, peer = self.cell, self.moving, self.peer
        peer.sendall(b"question")
        assert receive(moving, 8) == b"question"
        moving.sendall(b"answer")
        assert receive(peer, 6) == b"answer"
        until(lambda: not tcpinfo.unacknowledged_bytes(moving), "the acknowledgement")
        self._fill_receive_queue()
        if cell.state in (S.CLOSE_WAIT, S.LAST_ACK):
            peer.shutdown(socket.SHUT_WR)
            until(lambda: tcpinfo.read(moving).state is S.CLOSE_WAIT, "the peer's FIN")
        if cell.outgoing == "zero window":
            self._fill_the_peer()
        if cell.state is S.FIN_WAIT2:
            moving.shutdown(socket.SHUT_WR)
            until(lambda: tcpinfo.read(moving).state is S.FIN_WAIT2, "its acknowledgement")
        self.wall.deafen()
        self._fill_send_queue()
        if cell.state in (S.FIN_WAIT1, S.LAST_ACK, S.CLOSING):
            if cell.state is S.CLOSING:
                self.wall.mute()
            moving.shutdown(socket.SHUT_WR)
        if cell.state is S.CLOSING:
            self._cross()
        assert tcpinfo.read(moving).state is cell.state

    def _fill_receive_queue(self) -> None:
        moving, peer = self.moving, self.peer
        if self.cell.received == "empty":
            return
        size = 5000
        if self.cell.received == "full":
            size = 50_000 if self.cell.fin_received else 4_000_000
        peer.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, size)
        peer.setblocking(False)
        written = peer.send(blob(size))
        peer.settimeout(10)
        if size == 4_000_000:
            until(lambda: closed(peer), "the window to close")
        else:
            until(lambda: tcpinfo.unread_bytes(moving) == written == size, "the bytes")
        unread = tcpinfo.unread_bytes(moving)
        self.to_us, self.beyond = blob(written)[:unread], blob(written)[unread:]

    def _fill_the_peer(self) -> None:
        self.moving.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 4_000_000)
        self.moving.setblocking(False)
        self.to_peer = blob(4_000_000)
        self.to_peer = self.to_peer[:self.moving.send(self.to_peer)]
        self.moving.settimeout(10)
        until(lambda: closed(self.moving), "the peer's window to close")

    def _fill_send_queue(self) -> None:
        moving, kind = self.moving, self.cell.outgoing
        if kind in ("empty", "zero window"):
            return
        if kind == "corked":
            moving.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        moving.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        self.to_peer = blob(self.sizes[kind])
        self._write(kind)

    def _write(self, kind: str) -> None:
        moving = self.moving
        moving.sendall(self.to_peer)
        if kind == "partly acknowledged":
            until(lambda: select.select([self.peer], [], [], 0)[0], "it arrives")
            stamp = learn(moving, self.flow, self.injector) if self.cell.timestamps else None
            rcv_nxt, write_seq = repair.sequences(moving)
            acknowledge_part(self.flow, self.injector, sequence=rcv_nxt, upto=tcp.add(write_seq, -300), stamp=stamp)
            assert tcpinfo.unacknowledged_bytes(moving) == 300

    def _cross(self) -> None:
        """The peer's FIN, sent before ours came, arrives."""
        self.peer.shutdown(socket.SHUT_WR)
        stamp = learn(self.moving, self.flow, self.injector) if self.cell.timestamps else None
        rcv_nxt = repair.sequences(self.moving)[0]
        with repair.in_repair(self.moving):
            window = repair._read_window(self.moving)
        snd_una = repair.window_edges(self.moving)[1]
        shift = tcpinfo.read(self.moving).snd_wscale
        self.injector.deliver(self.flow, InjectSegment(rcv_nxt, snd_una, window.snd_wnd >> shift, stamp, True))

    # -- the pass ------------------------------------------------------------------------------------------------------

    def why_not(self) -> str | None:
        """What `pass` would say, before it touches anything."""
        try:
            inventory.find(os.getpid(), self.moving.fileno())
        except Refused as refused:
            return refused.message.partition(f" of process {os.getpid()} ")[2]
        return None

    def more_came(self, length: int) -> None:
        """The peer asks at a closed window again and again, from 200 ms on, and what was too full may be so no more:
        the kernel puts segments together (net/ipv4/tcp_input.c tcp_collapse)."""
        more = length - len(self.to_us)
        if more > 0:
            self.to_us, self.beyond = self.to_us + self.beyond[:more], self.beyond[more:]

    def read(self) -> ConnectionState:
        """Behind the silence, as in a pass: a timer that fires between the reading and the end would send more."""
        sock = self.moving
        sock.settimeout(None)  # as a borrowed socket is: with a time-out, Python would wait where the kernel would not
        recent = learn(sock, self.flow, self.injector) if self.cell.timestamps else None
        if recent is None:
            pay_acknowledgement(sock, self.flow, self.injector)
        silence = Silence(self.flow.ip_version)
        self.silence.callback(silence.close)
        silence.add(self.flow)
        return repair.read_state(sock, sockopt.read_all(sock), False, recent)

    def resume(self) -> None:
        """The pass came to nothing."""
        self.silence.close()

    def move(self, state: ConnectionState) -> None:
        """To a new socket; `moving` is that from here on. Nothing leaves until it is alive."""
        self.fin_unsent = state.fin_unsent
        before = self.recorder.packets_from(self.flow)
        repair.end_silently(self.moving)
        self.moving.close()
        self.moving, restorer = restore(state, self.injector)
        restorer.run(clock_steps(state, 1))
        assert self.recorder.packets_from(self.flow) == before, "something left meanwhile"
        self.silence.close()
        restorer.run(activation_steps(state))
        assert restorer.reports == []
        assert not repair.is_in_repair(self.moving)

    # -- the rest of its life ------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Every byte reaches its program, both ends close, and nothing is left."""
        cell, moving, peer = self.cell, self.moving, self.peer
        self.wall.fall()
        moving.settimeout(10)
        peer.settimeout(10)
        if not self.fin_unsent:  # it would come to a peer that has closed, and to an end that is no more
            self._nudge()
        assert receive(moving, len(self.to_us)) == self.to_us
        if cell.fin_received:
            assert moving.recv(1) == b""
        else:
            assert receive(moving, len(self.beyond)) == self.beyond
            peer.sendall(b"more" * 1000)
            assert receive(moving, 4000) == b"more" * 1000
        if cell.fin_queued:
            assert moving.fileno() != -1
        elif cell.outgoing == "corked":
            moving.sendall(b"the end")
            moving.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
            self.to_peer += b"the end"
        else:
            moving.sendall(b"the end")
            self.to_peer += b"the end"
        if not cell.fin_queued:
            moving.shutdown(socket.SHUT_WR)
        assert receive(peer, len(self.to_peer)) == self.to_peer
        assert peer.recv(1) == b""
        if not cell.fin_received:
            peer.shutdown(socket.SHUT_WR)
            assert moving.recv(1) == b""
        until(lambda: tcpinfo.read(moving).state is S.CLOSE and tcpinfo.read(peer).state is S.CLOSE,
              "both to have closed")

    def _nudge(self) -> None:
        """The peer says again what it has acknowledged, which was lost: a hold would have kept it."""
        rcv_wup, snd_una = repair.window_edges(self.peer)
        back = Flow(self.flow.peer, self.flow.local, self.flow.mapped)
        self.injector.deliver_old(back, tcp.add(rcv_wup, -1), snd_una, b"")

    def judge(self) -> None:
        expect = verify.Expectations(fin_passed=True, fin_peer=True, passes=1)
        verdict = verify.verify([until_closed(self.recorder.capture(), self.flow)], self.flow, expect)
        assert verdict.ok, "\n".join(map(str, verdict.violations[:20]))
        settled = verdict.negotiated
        assert (settled.timestamps, settled.sack, bool(settled.window_scale)) == (
            self.cell.timestamps, self.cell.sack, self.cell.scaling)

    def close(self) -> None:
        for part in (self.moving, self.peer, self.recorder, self.injector, self.silence):
            part.close()
        self.wall.fall()


def closed(sock: socket.socket) -> bool:
    """All that may be sent is acknowledged, and some is left."""
    left = tcpinfo.unsent_bytes(sock)
    return left > 0 and tcpinfo.unacknowledged_bytes(sock) == left


def matches(cell: Cell, state: ConnectionState, play: Play) -> None:
    """What was read is what the cell says."""
    assert state.tcp_state is cell.state
    play.more_came(len(state.received))
    assert state.received == play.to_us
    assert state.outgoing == (play.to_peer[-len(state.outgoing):] if state.outgoing else b"")
    if cell.outgoing != "zero window":
        part = len(state.outgoing) if 0 < len(state.outgoing) < len(play.to_peer) else 300
        assert len(state.outgoing) == {"empty": 0, "in flight": 3000, "partly acknowledged": part, "unsent": 100_000,
                                       "corked": 100}[cell.outgoing]
    waits = cell.outgoing in ("unsent", "zero window")
    if cell.outgoing == "corked":  # for 200 ms: the kernel's timer takes the cork for a closed window
        assert state.unsent in (0, 100)
    else:
        assert bool(state.unsent) == waits
    assert state.fin_unsent == (waits and cell.fin_queued)


def came_alive(cell: Cell, state: ConnectionState, sock: socket.socket) -> None:
    """The new socket has the numbers of the old one."""
    became = S.LAST_ACK if state.fin_unsent and cell.state is S.CLOSING else cell.state
    assert tcpinfo.read(sock).state is became
    assert repair.sequences(sock) == (state.rcv_nxt, state.write_seq)
    assert tcpinfo.unread_bytes(sock) == len(state.received)
    assert repair.window_edges(sock)[1] == state.snd_una
    if cell.outgoing == "corked":
        assert tcpinfo.unsent_bytes(sock) == state.unsent, "a tail that the program holds back was pushed out"


def play(cell: Cell, kind: type[Play] = Play) -> str | None:
    """In a network namespace of its own. Returns why it was refused, which has no effect, or None."""
    this = kind(cell)
    try:
        this.arrange()
        why_not = this.why_not()
        if why_not is None:
            state = this.read()
            matches(cell, state, this)
            this.move(state)
            came_alive(cell, state, this.moving)
        this.finish()
        this.judge()
    finally:
        this.close()
    return why_not


def product(*, ecn: tuple[bool, ...] = (False,)) -> Iterator[Cell]:
    """Every cell that can be."""
    switch = (True, False)
    for values in itertools.product(STATES, RECEIVED, OUTGOING, switch, switch, switch, ecn, FAMILIES):
        cell = Cell(*values)
        if cell.can_be:
            yield cell


def pairwise(cells: list[Cell]) -> list[Cell]:
    """Few of these cells, in which every two values of different fields that meet in any of them meet: the next one is
    always the first of those that show most that is new."""
    fields = list(Cell.__dataclass_fields__)

    def pairs(cell: Cell) -> frozenset[tuple[object, ...]]:
        values = [(name, getattr(cell, name)) for name in fields]
        return frozenset(itertools.combinations(values, 2))

    shows = {cell: pairs(cell) for cell in cells}
    missing = set().union(*shows.values())
    found = []
    while missing:
        best = max(cells, key=lambda cell: len(shows[cell] & missing))
        missing -= shows[best]
        found.append(best)
    return found
