"""One of the two processes between which benchmarks/others.py hands a socket over, with SCM_RIGHTS (unix(7)).

    python handover.py DESCRIPTOR [--port PORT]

DESCRIPTOR is an end of a socket pair, whose other end the other process has. The one with `--port` accepts the
connection. A line on stdin tells the one that has the connection to hand it over: the socket, and what the application
knows of it, the state of a `Responder`. As `lab.node` does, it tells what happens: listening, serving.
"""

from __future__ import annotations

import argparse
import os
import select
import socket

from criu_tcpcp.lab.answering import Responder
from criu_tcpcp.lab.node import say

_STDIN = 0
_STATE_BYTES = 4096      # a `Responder` has some 30


def accept(port: int) -> tuple[socket.socket, Responder]:
    with socket.create_server(("0.0.0.0", port)) as listener:
        say("listening")
        sock, _address = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock, Responder(1, 100)


def serve(sock: socket.socket, responder: Responder, other: socket.socket) -> bool:
    """Answer, until the connection is handed over (True) or at its end (False)."""
    say("serving", fd=sock.fileno())
    watched: list[socket.socket | int] = [sock, _STDIN]
    while True:
        readable, _, _ = select.select(watched, [], [])
        if sock in readable:
            data = sock.recv(1 << 16)
            if not data:
                return False
            responder.feed(data)
            while owed := responder.owed():
                responder.took(sock.send(owed))
        elif _STDIN in readable:
            if not os.read(_STDIN, 1 << 10):
                return False
            socket.send_fds(other, [responder.state()], [sock.fileno()])
            return True


def take(other: socket.socket) -> tuple[socket.socket, Responder] | None:
    """The connection from the other process; None if that has ended."""
    state, descriptors, _flags, _address = socket.recv_fds(other, _STATE_BYTES, 1)
    return (socket.socket(fileno=descriptors[0]), Responder.from_state(state)) if descriptors else None


def main() -> int:
    parser = argparse.ArgumentParser(prog="handover.py")
    parser.add_argument("descriptor", type=int)
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    Responder(1, 100)      # what the first one costs is spent here, not while a peer waits
    with socket.socket(fileno=arguments.descriptor) as other:
        mine = accept(arguments.port) if arguments.port else take(other)
        while mine is not None:
            sock, responder = mine
            with sock:
                if not serve(sock, responder, other):
                    break
            mine = take(other)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
