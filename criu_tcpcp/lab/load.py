"""Peer programs: processes that talk to the passed end and report what they saw. `python -m criu_tcpcp.lab.load NAME`.

    rr-peer HOST PORT        one request at a time, at a fixed rate; every answer is checked and timed
    burst-peer HOST PORT     requests without waiting for the answers: in bursts, or as many as the queues take
    stream-peer HOST PORT    two paced streams at the same time, checked byte by byte

Each prints `ready LOCALPORT` once connected, and one JSON object at its end: `error` (null, or what it saw), counts,
and stalls: `stall_max_ns`, `stall_p50_ns`, `stall_p99_ns`, and the worst (`--worst`, 20) with their wall-clock times.
For rr-peer a stall is a response time, for the others the time between two instants at which a byte moved. SIGTERM
(or, with --until-eof, the end of stdin) asks rr-peer and burst-peer for an orderly end: the requests in flight are
answered, the write side shut down, the other end's EOF awaited. A stream-peer has an end of its own; SIGTERM before
that is an error, and reported. Exit status 1 if there was an error.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import select
import signal
import socket
import sys
import time
from array import array
from typing import Any

from .answering import Pace, StreamEnd
from .streams import Checker, Stream

_GOODBYE_S = 10.0


class PeerError(Exception):
    """What the program saw and must report."""


class Stalls:
    """Durations in nanoseconds: percentiles of all, and the `worst` with the wall-clock time at which each began."""

    def __init__(self, worst: int = 20) -> None:
        self._all = array("q")
        self._keep = worst
        self._worst: list[tuple[int, int]] = []

    def add(self, duration_ns: int, wall_ns: int) -> None:
        self._all.append(duration_ns)
        if len(self._worst) < self._keep:
            heapq.heappush(self._worst, (duration_ns, wall_ns))
        elif duration_ns > self._worst[0][0]:
            heapq.heapreplace(self._worst, (duration_ns, wall_ns))

    def to_json(self) -> dict[str, Any]:
        ordered = sorted(self._all)

        def percentile(share: float) -> int:
            return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0

        return {"stall_max_ns": ordered[-1] if ordered else 0, "stall_p50_ns": percentile(0.5),
                "stall_p99_ns": percentile(0.99),
                "stalls": [{"ns": duration, "at_ns": wall} for duration, wall in sorted(self._worst, reverse=True)]}


class Stop:
    """SIGTERM, the end of stdin, or the end of the time: readable as a file descriptor, so that a wait ends at once."""

    def __init__(self, *, stdin: bool, seconds: float | None) -> None:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        self._stdin = [sys.stdin.fileno()] if stdin else []
        self._deadline = time.monotonic() + seconds if seconds is not None else None
        self.asked = False

    def wait(self, sock: socket.socket, timeout_s: float) -> bool:
        """Wait for the socket, for at most `timeout_s`; True if it is readable. Notes a request to stop."""
        if self._deadline is not None and not self.asked:
            left = max(self._deadline - time.monotonic(), 0)
            self.asked = not left
            timeout_s = min(left, timeout_s)
        watched = [] if self.asked else [self._read.fileno(), *self._stdin]
        readable, _, _ = select.select([sock, *watched], [], [], timeout_s)
        self._note(readable)
        return sock in readable

    def sleep(self, seconds: float) -> None:
        """The same without the socket."""
        readable, _, _ = select.select([] if self.asked else [self._read.fileno(), *self._stdin], [], [], seconds)
        self._note(readable)

    def _note(self, readable: list[Any]) -> None:
        if self._read.fileno() in readable or any(fd in readable and not os.read(fd, 4096) for fd in self._stdin):
            self.asked = True


def request_response(sock: socket.socket, stop: Stop, *, rate: float, size: int, answer_size: int, seed: int,
                     answer_limit_s: float = 60.0, worst: int = 20, echoed: bool = False) -> dict[str, Any]:
    """Request n is due 1/rate after request n-1 was, or right after its answer if that came later. `echoed`: the
    answers are the requests themselves."""
    requests, answers = Stream(seed), Checker(seed if echoed else seed + 1)
    stalls = Stalls(worst)
    sent = answered = 0
    error: str | None = None
    due = time.monotonic()
    try:
        while True:
            while (left := due - time.monotonic()) > 0 and not stop.asked:
                if stop.wait(sock, left):
                    raise PeerError("end of stream" if not sock.recv(1) else "a byte that was not asked for")
            stop.wait(sock, 0)
            if stop.asked:
                break
            begun, wall = time.monotonic(), time.time_ns()
            sock.sendall(requests.read(sent * size, size))
            sent += 1
            while answers.offset < sent * answer_size:
                if not stop.wait(sock, answer_limit_s):
                    if time.monotonic() - begun > answer_limit_s:
                        raise PeerError(f"no answer to request {sent - 1} within {answer_limit_s:g} s")
                    continue
                data = sock.recv(sent * answer_size - answers.offset)
                if not data:
                    raise PeerError(f"end of stream at byte {answers.offset}, in the answer to request {sent - 1}")
                answers.feed(data)
            if answers.wrong:
                raise PeerError(f"wrong answer to request {sent - 1}: {answers.finish()}")
            now = time.monotonic()
            answered += 1
            stalls.add(int((now - begun) * 1e9), wall)
            due = max(due + 1 / rate, now)
        _goodbye(sock)
    except (OSError, PeerError) as problem:
        error = str(problem)
    return {"program": "rr-peer", "error": error, "requests": sent, "answers": answered, "bytes_sent": sent * size,
            "bytes_received": answers.offset, **stalls.to_json()}


def bursts(sock: socket.socket, stop: Stop, *, size: int, answer_size: int, burst: int, pause_s: float,
           read_rate: float | None, seed: int, answer_limit_s: float = 60.0) -> dict[str, Any]:
    """`burst` requests at once, and the next ones `pause_s` after the last answer; a burst of 0 has no end: requests as
    long as the socket takes them, so that with a low `read_rate` (bytes a second) all queues on the way are full."""
    requests, answers = Stream(seed), Checker(seed + 1, sha256=True)
    stalls, reading = Stalls(), Pace(read_rate)
    sent = target = 0  # bytes of requests
    error: str | None = None
    due = last = time.monotonic()
    wall = time.time_ns()
    try:
        while True:
            now = time.monotonic()
            if stop.asked:
                target, reading = -(-sent // size) * size, Pace(None)
            elif not burst:
                target = sent + size
            elif answers.offset == target // size * answer_size and now >= due:
                target, last, wall = target + burst * size, now, time.time_ns()
            wanted = target // size * answer_size
            moved = False
            if sent < target and (taken := _send(sock, requests.read(sent, min(target - sent, 1 << 16)))):
                sent, moved = sent + taken, True
            left = wanted - answers.offset
            if left and (allowed := reading.allowance(now, answers.offset, left)) and (data := _receive(sock, allowed)):
                answers.feed(data)
                moved = True
                if answers.wrong:
                    raise PeerError(f"wrong answer: {answers.finish()}")
                if answers.offset == wanted:
                    due = time.monotonic() + pause_s
            if moved:
                stalls.add(int((time.monotonic() - last) * 1e9), wall)
                last, wall = time.monotonic(), time.time_ns()
                continue
            if stop.asked and answers.offset == wanted:
                break
            if left and now - last > answer_limit_s:
                raise PeerError(f"nothing moved for {answer_limit_s:g} s at {sent} sent, {answers.offset} received")
            if read_rate is not None and not stop.asked:
                stop.sleep(0.001)
            elif left:
                stop.wait(sock, 0.001 if sent < target else answer_limit_s)
            elif stop.wait(sock, max(due - now, 0)):
                raise PeerError("end of stream, or a byte that was not asked for")
        _goodbye(sock)
    except (OSError, PeerError) as problem:
        error = str(problem)
    return {"program": "burst-peer", "error": error, "requests": sent // size, "answers": answers.offset // answer_size,
            "bytes_sent": sent, "bytes_received": answers.offset, "sha256_received": answers.sha256,
            "sha256_expected": Stream(seed + 1).sha256(sent // size * answer_size), **stalls.to_json()}


def _send(sock: socket.socket, data: bytes) -> int:
    try:
        return sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return 0


def _receive(sock: socket.socket, length: int) -> bytes:
    try:
        data = sock.recv(length, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""
    if not data:
        raise PeerError("end of stream")
    return data


def _goodbye(sock: socket.socket) -> None:
    """Shut the write side, and wait for the other end's EOF."""
    sock.shutdown(socket.SHUT_WR)
    sock.settimeout(_GOODBYE_S)
    if sock.recv(1):
        raise PeerError("bytes after the last answer")


def stream(sock: socket.socket, end: StreamEnd, *, idle_limit_s: float = 60.0) -> dict[str, Any]:
    """Both streams to their ends; then the other end's EOF is awaited."""
    stalls = Stalls()
    error: str | None = None
    last, wall = time.monotonic(), time.time_ns()
    try:
        while not (end.done and end.eof):
            ending = end.done
            moved = end.step(sock)
            now = time.monotonic()
            if moved and not ending:
                stalls.add(int((now - last) * 1e9), wall)
            if moved:
                last, wall = now, time.time_ns()
                continue
            if now - last > idle_limit_s:
                raise PeerError(f"nothing moved for {idle_limit_s:g} s at {end.sent} sent, {end.received} received")
            end.wait(sock, idle_limit_s)
    except (OSError, PeerError) as problem:
        error = str(problem)
    fault = end.fault()
    if fault is not None:
        error = f"{error}; {fault}" if error else str(fault)
    return {"program": "stream-peer", "error": error, "bytes_sent": end.sent, "bytes_received": end.received,
            "sha256_sent": Stream(end.seed_out).sha256(end.sent), "sha256_received": end.sha256_received,
            **stalls.to_json()}


def _connect(arguments: argparse.Namespace) -> socket.socket:
    source = (arguments.bind, 0) if arguments.bind else None
    sock = socket.create_connection((arguments.host, arguments.port), source_address=source)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print("ready", sock.getsockname()[1], flush=True)
    return sock


def _terminated(*_: object) -> None:
    raise PeerError("SIGTERM before the streams ended")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m criu_tcpcp.lab.load")
    programs = parser.add_subparsers(dest="program", required=True)
    for name in ("rr-peer", "burst-peer", "stream-peer"):
        program = programs.add_parser(name)
        program.add_argument("host")
        program.add_argument("port", type=int)
        program.add_argument("--bind", metavar="ADDR")
        program.add_argument("--seed", type=int, default=1, help="of what this end sends; the other's is one more")
        if name == "burst-peer":
            program.add_argument("--size", type=int, default=100)
            program.add_argument("--answer-size", type=int)
            program.add_argument("--burst", type=int, default=0, help="requests at once; 0: as many as go")
            program.add_argument("--pause", type=float, default=0.0, help="seconds between a burst's end and the next")
            program.add_argument("--read-rate", type=float, help="bytes a second to read")
            program.add_argument("--until-eof", action="store_true", help="end when stdin does")
        elif name == "rr-peer":
            program.add_argument("--rate", type=float, default=1000.0, help="requests a second")
            program.add_argument("--size", type=int, default=100)
            program.add_argument("--answer-size", type=int)
            program.add_argument("--seconds", type=float)
            program.add_argument("--worst", type=int, default=20, help="how many response times to report")
            program.add_argument("--echoed", action="store_true", help="the answers are the requests, sent back")
            program.add_argument("--until-eof", action="store_true", help="end when stdin does")
        else:
            program.add_argument("--send", type=int, required=True)
            program.add_argument("--receive", type=int, required=True)
            program.add_argument("--rate", type=float, help="bytes a second to send")
            program.add_argument("--read-rate", type=float, help="bytes a second to read")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    stop = (Stop(stdin=arguments.until_eof, seconds=getattr(arguments, "seconds", None))
            if arguments.program != "stream-peer" else None)
    with _connect(arguments) as sock:
        if stop is not None and arguments.program == "burst-peer":
            report = bursts(sock, stop, size=arguments.size, answer_size=arguments.answer_size or arguments.size,
                            burst=arguments.burst, pause_s=arguments.pause, read_rate=arguments.read_rate,
                            seed=arguments.seed)
        elif stop is not None:
            report = request_response(sock, stop, rate=arguments.rate, size=arguments.size, seed=arguments.seed,
                                      answer_size=arguments.answer_size or arguments.size, worst=arguments.worst,
                                      echoed=arguments.echoed)
        else:
            signal.signal(signal.SIGTERM, _terminated)
            report = stream(sock, StreamEnd(arguments.seed, arguments.send, arguments.seed + 1, arguments.receive,
                                            rate=arguments.rate, read_rate=arguments.read_rate, sha256=True))
    print(json.dumps(report), flush=True)
    return 0 if report["error"] is None else 1


if __name__ == "__main__":
    sys.exit(main())
