"""UDP programs for lab hosts. `python -m criu_tcpcp.lab.datagrams NAME ...`:

    spare                                                a server with a UDP socket that nobody speaks to
    server --port 9000 [--listen ADDRESS] [--register]   answers each datagram with its bytes, by a connected socket
    peer HOST PORT --count N --rate PER_S [--size N]     numbered datagrams at a fixed rate, and what became of each

A server that listens connects its socket to whoever speaks first, so it has one client; it takes passed ones too. It
tells its events as JSON lines, as `lab.node` does. The peer prints `ready LOCALPORT`, and one JSON object at its end:
`sent`, `answered`, `lost`, `doubled`, `overtaken` (answers that came after a later one's), `changed` (with other
bytes), `last_answered` (its number), `error`, and `stall_max_ms`, the longest wait for an answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import socket
import struct
import sys
import threading
import time
from typing import Any

from ..application import Receiver, register
from .streams import Stream

_NUMBER = struct.Struct(">Q")
_LAST_ANSWER_S = 2.0
_MOST = 1 << 16
_say_lock = threading.Lock()


def say(event: str, **facts: Any) -> None:
    with _say_lock:
        print(json.dumps({"event": event, **facts}), flush=True)


class Answers:
    """Sends back what comes to one connected socket, until that fails. Parked, it holds no datagram."""

    def __init__(self, sock: socket.socket, how: str, registered: bool, answered: int = 0) -> None:
        self._sock, self._answered = sock, answered
        self._busy = threading.Lock()
        self._gone = False
        threading.Thread(target=self._run, daemon=True).start()
        if registered:
            register(sock, self._quiesce, resumed=self._busy.release, passed=self._passed)
        say("serving", fd=sock.fileno(), how=how, answered=answered)

    def _run(self) -> None:
        error = None
        try:
            while not self._gone:
                select.select([self._sock], [], [])
                with self._busy:
                    if not self._gone:
                        self._answer()
        except OSError as problem:
            error = str(problem)
        say("gone" if self._gone else "end", error=error, answered=self._answered)

    def _answer(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._sock.send(self._sock.recv(_MOST, socket.MSG_DONTWAIT))
            self._answered += 1

    def _quiesce(self) -> bytes:
        self._busy.acquire()
        return _NUMBER.pack(self._answered)

    def _passed(self) -> None:
        self._gone = True
        self._busy.release()


def _listen(arguments: argparse.Namespace) -> None:
    sock = socket.socket(socket.AF_INET6 if ":" in arguments.listen else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((arguments.listen, arguments.port))
    say("listening")
    _first, client = sock.recvfrom(_MOST, socket.MSG_PEEK)
    sock.connect(client)
    Answers(sock, "connected", arguments.register)


def spare(arguments: argparse.Namespace) -> int:
    """Knows nothing of passes: it has a UDP socket, and waits for what comes to that."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    say("listening", fd=sock.fileno())
    Answers(sock, "spare", registered=False)
    threading.Event().wait()
    return 0


def server(arguments: argparse.Namespace) -> int:
    with Receiver(port=arguments.port, protocol="udp") as receiver:
        if arguments.listen:
            threading.Thread(target=_listen, args=(arguments,), daemon=True).start()
        else:
            say("listening")
        for passed in receiver:
            answered = _NUMBER.unpack(passed.app_state)[0] if passed.app_state else 0
            Answers(passed.socket, "passed", arguments.register, answered)
    return 0


class Ledger:
    """What became of each number."""

    def __init__(self, size: int) -> None:
        self._stream, self._size = Stream(1), size
        self._sent_ns: list[int] = []
        self._answers: dict[int, int] = {}
        self._highest = -1
        self.doubled: list[int] = []
        self.overtaken: list[int] = []
        self.changed = 0
        self._stall_max_ns = 0

    def _bytes(self, number: int) -> bytes:
        return _NUMBER.pack(number) + self._stream.read(number, max(0, self._size - _NUMBER.size))

    def next(self) -> bytes:
        self._sent_ns.append(time.monotonic_ns())
        return self._bytes(len(self._sent_ns) - 1)

    def took(self, answer: bytes) -> None:
        number = _NUMBER.unpack_from(answer)[0] if len(answer) >= _NUMBER.size else -1
        if not 0 <= number < len(self._sent_ns) or answer != self._bytes(number):
            self.changed += 1
            return
        if number in self._answers:
            self.doubled.append(number)
            return
        if number < self._highest:
            self.overtaken.append(number)
        self._highest = max(self._highest, number)
        self._answers[number] = time.monotonic_ns() - self._sent_ns[number]

    @property
    def complete(self) -> bool:
        return len(self._answers) == len(self._sent_ns)

    def to_json(self) -> dict[str, Any]:
        lost = [number for number in range(len(self._sent_ns)) if number not in self._answers]
        return {"sent": len(self._sent_ns), "answered": len(self._answers), "lost": lost[:50],
                "doubled": self.doubled[:50], "overtaken": self.overtaken[:50], "changed": self.changed,
                "last_answered": self._highest,
                "stall_max_ms": max(self._answers.values(), default=0) / 1e6}


def peer(arguments: argparse.Namespace) -> int:
    family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
    ledger, error = Ledger(arguments.size), None
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((arguments.host, arguments.port))
        print(f"ready {sock.getsockname()[1]}", flush=True)
        try:
            _talk(sock, ledger, arguments)
        except OSError as problem:
            error = str(problem)
    print(json.dumps({"program": "datagrams-peer", **ledger.to_json(), "error": error}), flush=True)
    return int(error is not None)


def _talk(sock: socket.socket, ledger: Ledger, arguments: argparse.Namespace) -> None:
    """Until `count` are sent, or stdin ends; then the last answers."""
    began, sent, last = time.monotonic(), 0, None
    while last is None or (not ledger.complete and time.monotonic() < last):
        due = began + sent / arguments.rate
        until = due if last is None else last
        watched = [sock] if last is not None else [sock, sys.stdin]
        ready, _, _ = select.select(watched, [], [], max(0.0, until - time.monotonic()))
        if sock in ready:
            ledger.took(sock.recv(_MOST))
        if last is None and (sent == arguments.count or sys.stdin in ready):
            last = time.monotonic() + _LAST_ANSWER_S
        elif last is None and time.monotonic() >= due:
            sock.send(ledger.next())
            sent += 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m criu_tcpcp.lab.datagrams")
    programs = parser.add_subparsers(dest="program", required=True)
    one = programs.add_parser("server")
    one.add_argument("--port", type=int, default=9000)
    one.add_argument("--listen", metavar="ADDRESS")
    one.add_argument("--register", action="store_true")
    one.set_defaults(run=server)
    programs.add_parser("spare").set_defaults(run=spare)
    one = programs.add_parser("peer")
    one.add_argument("host")
    one.add_argument("port", type=int)
    one.add_argument("--count", type=int, default=-1)
    one.add_argument("--rate", type=float, default=1000.0)
    one.add_argument("--size", type=int, default=100)
    one.set_defaults(run=peer)
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
