"""The matrix of tests/cells.py, played to the strict peer (criu_tcpcp.lab.strict): it speaks over a TUN interface of
the same network namespace, and objects to the first segment that no honest endpoint sends."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from typing import ClassVar

from cells import Cell, Play, S, blob, closed
from criu_tcpcp import verify
from criu_tcpcp.core.endpoint import Endpoint, Flow
from criu_tcpcp.kernel import tcpinfo
from criu_tcpcp.kernel.rawpacket import Injector
from criu_tcpcp.kernel.rules import MARK
from criu_tcpcp.lab.strict.segments import from_bytes, to_bytes
from criu_tcpcp.lab.strict.tcp import Settings, State, Tcp
from endpoints import leads_to
from waiting import PATIENCE_S, until

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_SMALL = 20_000  # bytes: the peer's buffer, where it is full soon
_OURS = 100_000  # the same of the passed end: still so large that its window is scaled
_PORT = 9000
ADDRESSES = {4: ("10.9.0.1", "10.9.0.2"), 6: ("fd09::1", "fd09::2")}


def open_tun() -> int:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"strict0", _IFF_TUN | _IFF_NO_PI))
    orders = ["link set strict0 mtu 1500 up", "addr add 10.9.0.1/24 dev strict0",
              "addr add fd09::1/64 dev strict0 nodad"]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(orders) + "\n", text=True, check=True)
    until(lambda: leads_to(ADDRESSES[6][1]), "the route to the peer")
    return tun


class Seen:
    """What went over the TUN interface, as a capture at the peer."""

    def __init__(self) -> None:
        self.packets: list[verify.Packet] = []

    def packets_from(self, flow: Flow) -> int:
        return sum(packet.src == flow.local for packet in self.packets)

    def capture(self) -> verify.Capture:
        return verify.Capture("peer", verify.Role.PEER, tuple(self.packets))


class StrictPlay(Play):
    """One cell. `deaf`: the passed end does not hear the peer; `mute`: the other way round; `hears`: how many of its
    segments the peer still hears."""

    sizes: ClassVar[dict[str, int]] = {**Play.sizes, "partly acknowledged": 3000}

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        cell.settle()
        self._tun = open_tun()
        self.seen = Seen()
        self.recorder = self.seen  # type: ignore[assignment]
        self.injector = Injector(cell.ip_version, MARK)
        self.silence = contextlib.ExitStack()
        self.deaf = False
        self.hears = 1 << 40
        self.fin_unsent = False
        self.to_us, self.to_peer, self.beyond = b"", b"", b""
        self._read_by_peer = b""
        self._reads, self._ends = True, False
        here, there = (Endpoint(ipaddress.ip_address(one), port)
                       for one, port in zip(ADDRESSES[cell.ip_version], (_PORT, 40000), strict=True))
        self.tcp = Tcp(Settings(there, here, iss=1000, tsval=5000, timestamps=cell.timestamps, sack=cell.sack,
                                window_scale=7 if cell.scaling else None,
                                mss=1440 if cell.ip_version == 6 else 1460,
                                buffer=_SMALL if cell.outgoing == "zero window" else 1 << 18))
        self.moving = self._accept()
        self.flow = tcpinfo.flow_of(self.moving)

    def _accept(self) -> socket.socket:
        family = socket.AF_INET if self.cell.family == "v4" else socket.AF_INET6
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self.cell.family == "v6")
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self.cell.received == "full":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _OURS)
            listener.bind(("0.0.0.0" if family == socket.AF_INET else "::", _PORT))
            listener.listen()
            self.tcp.connect(time.monotonic())
            self.until(lambda: self.tcp.state is State.OPEN, "the handshake")
            self.until(lambda: bool(select.select([listener], [], [], 0)[0]), "the connection")
            moving, _peer = listener.accept()
        moving.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return moving

    # -- the peer lives while somebody waits ---------------------------------------------------------------------------

    def pump(self) -> None:
        now = time.monotonic()
        self.tcp.tick(now)
        self._send()
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = from_bytes(os.read(self._tun, 1 << 16), len(self.seen.packets), time.time_ns())
                if isinstance(packet, verify.Packet):
                    self.seen.packets.append(packet)
                    if self.hears > 0 and not self._is_over():
                        self.hears -= bool(packet.payload_len)
                        self.tcp.receive(packet, time.monotonic())
                        self._send()
        if self._reads:
            self._read_by_peer += self.tcp.read(1 << 20, time.monotonic())
            self._send()

    def _is_over(self) -> bool:
        """The passed end has closed: nobody would be there to hear an answer to what its timer has repeated."""
        return self._ends and self.tcp.done and tcpinfo.read(self.moving).state is S.CLOSE

    def _send(self) -> None:
        for packet in self.tcp.take():
            if not self.deaf:
                data = to_bytes(packet)
                self.seen.packets.append(from_bytes(data, len(self.seen.packets),  # type: ignore[arg-type]
                                                    time.time_ns()))
                os.write(self._tun, data)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        self.pump()
        while not condition():
            assert time.monotonic() < deadline, f"in vain: {what}"
            select.select([self._tun], [], [], 0.002)
            self.pump()

    def ours(self, size: int) -> bytes:
        """Read so many bytes at the passed end."""
        data = bytearray()

        def has_come() -> bool:
            with contextlib.suppress(BlockingIOError):
                data.extend(self.moving.recv(size - len(data), socket.MSG_DONTWAIT))
            return len(data) == size
        self.until(has_come, f"{size} bytes, not {len(data)}")
        return bytes(data)

    def theirs(self, size: int) -> bytes:
        """The same at the peer."""
        self.until(lambda: len(self._read_by_peer) >= size, f"{size} bytes at the peer")
        data, self._read_by_peer = self._read_by_peer[:size], self._read_by_peer[size:]
        return data

    # -- how it comes to be --------------------------------------------------------------------------------------------

    def arrange(self) -> None:
        cell, moving, tcp = self.cell, self.moving, self.tcp
        tcp.write(b"question", time.monotonic())
        assert self.ours(8) == b"question"
        moving.sendall(b"answer")
        assert self.theirs(6) == b"answer"
        self.until(lambda: not tcpinfo.unacknowledged_bytes(moving) and not tcp.unacknowledged, "the acknowledgements")
        self._fill_receive_queue()
        if cell.state in (S.CLOSE_WAIT, S.LAST_ACK):
            tcp.close(time.monotonic())
            self.until(lambda: tcpinfo.read(moving).state is S.CLOSE_WAIT, "the peer's FIN")
        if cell.outgoing == "zero window":
            self._fill_the_peer()
        if cell.state is S.FIN_WAIT2:
            self._shut_down()
            self.until(lambda: tcpinfo.read(moving).state is S.FIN_WAIT2, "its acknowledgement")
        self.deaf = True
        self.hears = 0 if cell.state is S.CLOSING else self.hears
        self._fill_send_queue()
        if cell.state in (S.FIN_WAIT1, S.LAST_ACK, S.CLOSING):
            self._shut_down()
        if cell.state is S.CLOSING:
            self.deaf = False
            tcp.close(time.monotonic())
            self.until(lambda: tcpinfo.read(moving).state is S.CLOSING, "the peer's FIN")
            self.deaf = True
        self.pump()
        assert tcpinfo.read(moving).state is cell.state

    def _shut_down(self) -> None:
        self.tcp.judge.fin_after = -1
        self.moving.shutdown(socket.SHUT_WR)

    def _fill_receive_queue(self) -> None:
        moving, kind = self.moving, self.cell.received
        if kind == "empty":
            return
        full = kind == "full" and not self.cell.fin_received
        size = 3 * _OURS if full else 5000
        self.tcp.write(blob(size), time.monotonic())
        if full:
            self.until(lambda: self.tcp.unacknowledged > 0 and self.tcp.counts["zero_windows_received"] > 0,
                       "the window to close")
        else:
            self.until(lambda: not self.tcp.unacknowledged, "the bytes")
        unread = tcpinfo.unread_bytes(moving)
        self.to_us, self.beyond = blob(size)[:unread], blob(size)[unread:]

    def _fill_the_peer(self) -> None:
        self._reads = False
        moving = self.moving
        moving.setsockopt(socket.SOL_SOCKET, 32, 1 << 20)  # SO_SNDBUFFORCE
        self.to_peer = blob(200_000)
        moving.sendall(self.to_peer)
        self.until(lambda: bool(self.tcp.counts["zero_windows_sent"]) and closed(moving),
                   "the peer's window to close")

    def _write(self, kind: str) -> None:
        moving = self.moving
        if kind == "partly acknowledged":  # of one write the first segment
            hears = self.hears
            self.deaf, self.hears = False, 1
            moving.sendall(self.to_peer)
            self.until(lambda: 0 < tcpinfo.unacknowledged_bytes(moving) < len(self.to_peer), "an acknowledgement")
            self.deaf, self.hears = True, hears
        else:
            moving.sendall(self.to_peer)
        self.pump()

    # -- the rest of its life ------------------------------------------------------------------------------------------

    def finish(self) -> None:
        cell, moving, tcp = self.cell, self.moving, self.tcp
        self.deaf, self.hears, self._reads, self._ends = False, 1 << 40, True, True
        assert self.ours(len(self.to_us)) == self.to_us
        if not cell.fin_received:
            tcp.write(b"more" * 1000, time.monotonic())
            assert self.ours(len(self.beyond) + 4000) == self.beyond + b"more" * 1000
            tcp.close(time.monotonic())
        if not cell.fin_queued:
            moving.sendall(b"the end")
            self.to_peer += b"the end"
            moving.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
            # A peer that has closed answers what comes twice, and an end that is no more would answer that by RST.
            self.until(lambda: not tcpinfo.unacknowledged_bytes(moving), "the acknowledgements")
            self._shut_down()
        assert self.theirs(len(self.to_peer)) == self.to_peer
        self.until(lambda: tcp.done, "both to have closed")
        self.until(lambda: tcpinfo.read(moving).state is S.CLOSE, "the passed end to have closed")
        assert moving.recv(1) == b""

    def close(self) -> None:
        for part in (self.moving, self.injector, self.silence):
            part.close()
        os.close(self._tun)
