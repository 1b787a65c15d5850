"""What the examples have in common: the main program, in which what goes wrong is one line and an exit status, and a
client."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

from ..core.errors import Refused, TcpcpError
from .stage import PATIENCE_S, Stage


def run(play: Callable[[], None]) -> int:
    """Play it; the exit status."""
    try:
        play()
    except TcpcpError as problem:
        print(f"{os.path.basename(sys.argv[0])}: {problem}", file=sys.stderr)
        return int(problem.exit_code)
    except KeyboardInterrupt:
        return 130
    return 0


class Client:
    """An ordinary client at the lab's peer, which knows nothing of passes: it sends lines and waits for lines."""

    def __init__(self, here: Stage, port: int, address: str = "") -> None:
        with here.lab.peer.enter():
            self._sock = socket.create_connection((address or str(here.lab.origin.ipv4), port), timeout=PATIENCE_S)
        self._lines = self._sock.makefile("r", encoding="utf-8")
        self.name = "{}:{}".format(*self._sock.getsockname())

    def ask(self, line: str) -> str:
        """The answer to one line. Refused where the connection does not live."""
        try:
            self._sock.sendall(f"{line}\n".encode())
            answer = self._lines.readline()
        except OSError as error:
            raise Refused(f"the client {self.name} saw: {error.strerror or error}") from None
        if not answer.endswith("\n"):
            raise Refused(f"the client {self.name} saw the end of its connection")
        return answer.rstrip("\n")
