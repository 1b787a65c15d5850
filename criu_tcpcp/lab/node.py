"""A server program for lab hosts: serves connections that it accepted and connections that were passed to it alike.

    python -m criu_tcpcp.lab.node --port 9000 [--listen ADDRESS] [--kind echo|rr|stream] [--register] ...

`echo` sends back what it gets and knows nothing of passes (unless registered); `rr` and `stream` are the passed end of
`lab.load`, whose state goes along when the program registers its connections. What happens is told as JSON objects, one
a line: listening, serving (fd, how, pass id), gone (the connection was passed away), resumed, end (error, or null).
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import sys
import threading
from typing import Any

from ..application import Receiver, Registration, register
from .answering import Responder, StreamEnd

_CHUNK = 1 << 16
_QUIESCE_S = 5.0
_say_lock = threading.Lock()


def say(event: str, **facts: Any) -> None:
    with _say_lock:
        print(json.dumps({"event": event, **facts}), flush=True)


def wait_for(sock: socket.socket, writing: bool, also: int) -> None:
    """Until the socket can be written, or read, or `also` is readable."""
    select.select([also] if writing else [sock.fileno(), also], [sock.fileno()] if writing else [], [])


class Echo:
    """Sends back what it gets; the whole of its state is what it has not sent back yet."""

    def __init__(self, owed: bytes = b"") -> None:
        self._owed = owed

    def step(self, sock: socket.socket) -> bool:
        """Do what can be done at once; False at the end of the stream."""
        if not self._owed:
            self._owed = sock.recv(_CHUNK)
            if not self._owed:
                return False
        self._owed = self._owed[sock.send(self._owed):]
        return True

    def wait(self, sock: socket.socket, also: int) -> None:
        wait_for(sock, bool(self._owed), also)

    def state(self) -> bytes:
        return self._owed

    def fault(self) -> str | None:
        return None


class Answers:
    """`lab.answering.Responder` on a socket."""

    def __init__(self, responder: Responder) -> None:
        self._responder = responder

    def step(self, sock: socket.socket) -> bool:
        owed = self._responder.owed()
        if not owed:
            data = sock.recv(_CHUNK)
            if not data:
                return False
            owed = self._responder.feed(data)
        if owed:
            self._responder.took(sock.send(owed))
        return not self._responder.wrong

    def wait(self, sock: socket.socket, also: int) -> None:
        wait_for(sock, bool(self._responder.owed()), also)

    def state(self) -> bytes:
        return self._responder.state()

    def fault(self) -> str | None:
        return str(self._responder.fault) if self._responder.wrong else None


class Streams:
    """`lab.answering.StreamEnd` on a socket."""

    def __init__(self, end: StreamEnd) -> None:
        self._end = end

    def step(self, sock: socket.socket) -> bool:
        self._end.step(sock)
        return not (self._end.done and self._end.eof) and not self._end.wrong

    def wait(self, sock: socket.socket, also: int) -> None:
        self._end.wait(sock, 1.0, also)

    def state(self) -> bytes:
        return self._end.state()

    def fault(self) -> str | None:
        fault = self._end.fault() if self._end.wrong or self._end.eof else None
        return str(fault) if fault is not None else None


Work = Echo | Answers | Streams


class Worker:
    """Serves one connection in a thread; can be parked between two steps, where its state is complete."""

    def __init__(self, sock: socket.socket, work: Work, registered: bool, how: str, pass_id: str) -> None:
        self._sock, self._work = sock, work
        self._wake_read, self._wake_write = os.pipe()
        self._park, self._parked, self._go = threading.Event(), threading.Event(), threading.Event()
        self._gone = False
        self._registration: Registration | None = None
        self._told = threading.Event()
        # The peer waits for its answer: that first, and then the rest.
        threading.Thread(target=self._run, daemon=True).start()
        self._registration = (register(sock, self._quiesce, resumed=self._resumed, passed=self._passed)
                              if registered else None)
        say("serving", fd=sock.fileno(), how=how, id=pass_id)
        self._told.set()

    def _run(self) -> None:
        error = None
        try:
            more = True
            while more:
                self._work.wait(self._sock, self._wake_read)
                if self._park.is_set():
                    self._parked.set()
                    self._go.wait()
                    os.read(self._wake_read, 1)
                    self._park.clear()
                    self._parked.clear()
                    self._go.clear()
                    if self._gone:
                        break
                    continue
                more = self._work.step(self._sock)
        except OSError as problem:
            error = str(problem)
        self._told.wait()  # it may end before it is told of
        if self._registration is not None:
            self._registration.close()
        self._sock.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        say("gone" if self._gone else "end", error=error or self._work.fault())

    def _quiesce(self) -> bytes:
        self._park.set()
        os.write(self._wake_write, b"x")
        if not self._parked.wait(_QUIESCE_S):
            raise TimeoutError("the connection does not come to rest")
        return self._work.state()

    def _resumed(self) -> None:
        say("resumed")
        self._go.set()

    def _passed(self) -> None:
        self._gone = True
        self._go.set()


def _new_work(arguments: argparse.Namespace) -> Work:
    if arguments.kind == "rr":
        return Answers(Responder(arguments.seed, arguments.size, arguments.answer_size))
    if arguments.kind == "stream":
        return Streams(StreamEnd(arguments.seed + 1, arguments.send, arguments.seed, arguments.receive,
                                 rate=arguments.rate, read_rate=arguments.read_rate, close=not arguments.stay_open))
    return Echo()


def _continued_work(arguments: argparse.Namespace, state: bytes) -> Work:
    if arguments.kind == "rr":
        return Answers(Responder.from_state(state))
    if arguments.kind == "stream":
        return Streams(StreamEnd.from_state(state, rate=arguments.rate, read_rate=arguments.read_rate))
    return Echo(state)


def _accept(arguments: argparse.Namespace) -> None:
    listener = socket.create_server((arguments.listen, arguments.port),
                                    family=socket.AF_INET6 if ":" in arguments.listen else socket.AF_INET,
                                    dualstack_ipv6=arguments.listen == "::")
    say("listening")
    while True:
        sock, _address = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if arguments.control:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, arguments.control.encode())
        Worker(sock, _new_work(arguments), arguments.register, "accepted", "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m criu_tcpcp.lab.node")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--listen", metavar="ADDRESS")
    parser.add_argument("--kind", choices=["echo", "rr", "stream"], default="echo")
    parser.add_argument("--register", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--answer-size", type=int)
    parser.add_argument("--send", type=int, default=0)
    parser.add_argument("--receive", type=int, default=0)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--read-rate", type=float)
    parser.add_argument("--control", metavar="NAME", help="congestion control of what is accepted")
    parser.add_argument("--stay-open", action="store_true", help="send no end of the stream")
    parser.add_argument("--receiver-path", help="take connections here instead of by their port")
    parser.add_argument("--user", type=int, help="become this user first")
    arguments = parser.parse_args(argv)
    _new_work(arguments)  # what the first one costs is spent here, not while a peer waits
    if arguments.user is not None:
        os.setgroups([])
        os.setgid(arguments.user)
        os.setuid(arguments.user)
    with (Receiver(path=arguments.receiver_path) if arguments.receiver_path
          else Receiver(port=arguments.port)) as receiver:
        if arguments.listen:
            threading.Thread(target=_accept, args=(arguments,), daemon=True).start()
        else:
            say("listening")
        for passed in receiver:
            Worker(passed.socket, _continued_work(arguments, passed.app_state), arguments.register, "passed", passed.id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
