"""Bugs on purpose, for tests of those who watch the wire: each breaks a pass in one known way, and must be noticed.

Python imports a module of this name by itself when it starts, if its directory is on PYTHONPATH. Where
CRIU_TCPCP_SABOTAGE names a bug, one function of the tool that is about to run is replaced; the tool itself has no hook
for that. `sabotaged.py`, one directory up, gives the environment and the options for a pass.

    tsval-back      the destination's TSval clock goes one second back
    tsecr-zero      the destination speaks before it has heard the peer, and without the peer's last timestamp: TSecr 0
    origin-rst      the origin resets the connection that it has passed away
    lost-byte       the first byte that is to be sent after the pass never is: its sequence number is skipped
    shrunk-window   the destination announces half the window that the origin had announced
    origin-speaks   the origin says once more what it said last, after the destination has been heard

The bugs are put in where a state becomes a socket (`Restorer.run`) and where the old socket ends (`end_silently`). The
rehearsal of a pass, over loopback, is spared: it must succeed, or there would be no pass.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

_SECOND_MS = 1000
_TCP_WINDOW_CLAMP = 10  # linux/tcp.h
_ETHERNET, _RST, _ACK = 1, 0x04, 0x10
_PATIENCE_S = 2.0


def _is_rehearsal(sock: socket.socket, steps: list[Any] | None = None) -> bool:
    """It is over loopback; a plan that begins with a new socket says so itself."""
    from criu_tcpcp.core.restoreplan import Bind
    bound = [str(step.local.address) for step in steps or [] if isinstance(step, Bind)]
    return (bound or sock.getsockname())[0] in ("127.0.0.1", "::1")


def _change_plan(change: Callable[[Any, list[Any]], list[Any]]) -> None:
    """`Restorer.run` does what `change(restorer, steps)` makes of a plan."""
    from criu_tcpcp.kernel.repair import Restorer
    honest = Restorer.run

    def run(self: Restorer, steps: list[Any]) -> None:
        honest(self, steps if _is_rehearsal(self.sock, steps) else change(self, steps))

    Restorer.run = run  # type: ignore[method-assign]


def _change_steps(change: Callable[[Any, Any], list[Any]]) -> None:
    """The same, where each step can be changed by itself."""
    _change_plan(lambda restorer, steps: [new for step in steps for new in change(restorer, step)])


@dataclasses.dataclass(frozen=True)
class _Last:
    """Where the origin stood at its end."""

    rcv_nxt: int
    write_seq: int
    window: int  # as on the wire: scaled


def _after_the_end(speak: Callable[[Any, _Last], None]) -> None:
    """`speak(flow, last)` once the origin's socket has ended."""
    from criu_tcpcp.core import tcp
    from criu_tcpcp.core.endpoint import Flow
    from criu_tcpcp.kernel import repair, tcpinfo
    honest = repair.end_silently

    def end_silently(sock: socket.socket) -> None:
        if _is_rehearsal(sock):
            honest(sock)
            return
        flow, scale = Flow.of_socket(sock), tcpinfo.read(sock).rcv_wscale
        rcv_nxt, write_seq = repair.sequences(sock)
        with repair.in_repair(sock):
            window = repair._read_window(sock)
        honest(sock)
        right_edge = tcp.add(window.rcv_wup, window.rcv_wnd)
        speak(flow, _Last(rcv_nxt, write_seq, min(tcp.distance(right_edge, rcv_nxt) >> scale, 0xFFFF)))

    repair.end_silently = end_silently


def _say(flow: Any, last: _Last, flags: int, timestamps: tuple[int, int] | None) -> None:
    """A segment of the origin's, by the way that no fence closes: with the tool's own mark."""
    from criu_tcpcp.kernel.rawpacket import Injector, build_segment
    from criu_tcpcp.kernel.rules import MARK
    packet = build_segment(flow.local, flow.peer, sequence=last.write_seq, acknowledgement=last.rcv_nxt, flags=flags,
                           window=last.window, timestamps=timestamps)
    injector = Injector(flow.ip_version, MARK)
    try:
        injector._socket.sendto(packet, (str(flow.peer.address), 0))
    finally:
        injector.close()


# -- at the destination -----------------------------------------------------------------------------------------------

def _tsval_back() -> None:
    from criu_tcpcp.core import tcp
    from criu_tcpcp.core.restoreplan import SetTimestamp

    def change(_restorer: Any, step: Any) -> list[Any]:
        return [SetTimestamp(tcp.add(step.value, -_SECOND_MS))] if isinstance(step, SetTimestamp) else [step]

    _change_steps(change)


def _tsecr_zero() -> None:
    """What was held comes after the probe: so Committed is said only once the connection is alive."""
    from criu_tcpcp.core import handoff
    from criu_tcpcp.core.handoff import Action
    from criu_tcpcp.core.restoreplan import InjectSegment, LeaveRepair, RecallPath

    def change(_restorer: Any, step: Any) -> list[Any]:
        if isinstance(step, InjectSegment) and not step.fin:
            return []
        if isinstance(step, RecallPath):
            return [dataclasses.replace(step, segment=dataclasses.replace(step.segment, timestamp=None))]
        return [LeaveRepair(probe=True)] if isinstance(step, LeaveRepair) else [step]

    _change_steps(change)
    for key, transition in handoff.DESTINATION.items():
        actions = list(transition.actions)
        if Action.SEND_COMMITTED in actions and Action.ACTIVATE in actions:
            actions.remove(Action.SEND_COMMITTED)
            actions.insert(actions.index(Action.ACTIVATE) + 1, Action.SEND_COMMITTED)
            handoff.DESTINATION[key] = dataclasses.replace(transition, actions=tuple(actions))


def _lost_byte() -> None:
    """What is in flight counts as acknowledged: the peer has it by now, and would not miss a byte of it."""
    from criu_tcpcp.core import tcp
    from criu_tcpcp.core.restoreplan import FillQueue, InjectSegment, RecallPath, SetSequence, WriteUnsent

    def acknowledging(segment: InjectSegment, skip: int) -> InjectSegment:
        return dataclasses.replace(segment, acknowledgement=tcp.add(segment.acknowledgement, skip))

    def change(_restorer: Any, steps: list[Any]) -> list[Any]:
        in_flight = [step for step in steps if isinstance(step, FillQueue) and step.queue == "send"]
        skip = sum(len(step.data) for step in in_flight) + 1
        changed = []
        for step in steps:
            match step:
                case SetSequence("send", sequence):
                    changed.append(SetSequence("send", tcp.add(sequence, skip)))
                case InjectSegment():  # or the peer's last timestamp would be lost too
                    changed.append(acknowledging(step, skip))
                case RecallPath(segment=segment):
                    changed.append(dataclasses.replace(step, segment=acknowledging(segment, skip)))
                case WriteUnsent(data):
                    changed.append(WriteUnsent(data[1:]))
                case _ if step not in in_flight:
                    changed.append(step)
        return changed

    _change_plan(change)


def _shrunk_window() -> None:
    """Half the window is announced from the first segment on only if the socket may not offer more."""
    from criu_tcpcp.core.restoreplan import LeaveRepair, SetWindow
    halves: list[int] = []

    def change(restorer: Any, step: Any) -> list[Any]:
        if isinstance(step, SetWindow):
            halves.append(step.window.rcv_wnd // 2)
            return [SetWindow(dataclasses.replace(step.window, rcv_wnd=halves[-1]))]
        if isinstance(step, LeaveRepair):
            restorer.sock.setsockopt(socket.IPPROTO_TCP, _TCP_WINDOW_CLAMP, halves[-1])
        return [step]

    _change_steps(change)


# -- at the origin ----------------------------------------------------------------------------------------------------

def _origin_rst() -> None:
    _after_the_end(lambda flow, last: _say(flow, last, _RST | _ACK, None))


def _origin_speaks() -> None:
    """The peer's packets still come by the origin: one that acknowledges what the origin never sent shows that the
    destination has been heard."""
    _after_the_end(lambda flow, last: _say(flow, last, _ACK, _wait_for_news(flow, last.write_seq)))


def _wait_for_news(flow: Any, write_seq: int) -> tuple[int, int] | None:
    """Until the peer acknowledges more than `write_seq`, or in vain for _PATIENCE_S. Returns timestamps (TSval, TSecr)
    that nobody can object to, those of the newest packet turned round; None where it has none."""
    from criu_tcpcp.core import tcp
    from criu_tcpcp.verify.container import Frame
    from criu_tcpcp.verify.decode import decode
    from criu_tcpcp.verify.packet import Packet
    found = None
    deadline = time.monotonic() + _PATIENCE_S
    protocol = 0x0800 if flow.ip_version == 4 else 0x86DD
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol)) as tap:
        while (left := deadline - time.monotonic()) > 0:
            tap.settimeout(left)
            try:
                data = tap.recv(1 << 17)
            except TimeoutError:
                break
            packet = decode(Frame(1, 0, _ETHERNET, data, len(data)), "")
            if not isinstance(packet, Packet) or (packet.src, packet.dst) != (flow.peer, flow.local):
                continue
            if packet.options.tsval is not None and packet.options.tsecr is not None:
                found = (packet.options.tsecr, packet.options.tsval)
            if tcp.distance(packet.ack, write_seq) > 0:
                break
    return found


_BUGS = {"tsval-back": _tsval_back, "tsecr-zero": _tsecr_zero, "lost-byte": _lost_byte, "shrunk-window": _shrunk_window,
         "origin-rst": _origin_rst, "origin-speaks": _origin_speaks}

_wanted = os.environ.get("CRIU_TCPCP_SABOTAGE")
if _wanted:
    try:
        _BUGS[_wanted]()
    except BaseException:  # noqa: BLE001 - Python would print it and go on: a pass without the bug
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)
