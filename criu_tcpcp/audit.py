"""The audit of a guarded door: what was asked by which key, and what became of it; one line each, without payload.

Where the path is a socket, a log daemon gets the line as syslog(3) would send it (LOG_AUTHPRIV, LOG_NOTICE), but a
daemon that is not there is noticed: without a line nothing is let in. Else it is a file, to which lines are appended.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import time

from .core.errors import KernelError, Refused
from .kernel.syscalls import failing

_PRIORITY = 10 << 3 | 5  # LOG_AUTHPRIV, LOG_NOTICE (syslog.h)
_TIMEOUT_S = 2.0
_LONGEST = 1000  # bytes of a value; RFC 3164 daemons take 1024 of a line, today's 8 KiB


class Audit:
    """Of one process."""

    def __init__(self, path: str) -> None:
        self._path = path

    def tell(self, verdict: str, **facts: str) -> None:
        """One line: NAME=VALUE, the value as JSON writes a string. Refused where it cannot be written."""
        said = {"verdict": verdict, **{name: value for name, value in facts.items() if value}}
        line = " ".join(f"{name}={json.dumps(value[:_LONGEST])}" for name, value in said.items())
        try:
            self._write(line)
        except KernelError as error:
            raise Refused("the destination cannot write its audit log, and passes nothing without it",
                          hint=f"for its administrator: {self._path}: {error.message}") from None

    def _write(self, line: str) -> None:
        if self._is_socket():
            with failing("send"), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(_TIMEOUT_S)
                sock.connect(self._path)
                sock.send(f"<{_PRIORITY}>criu-tcpcp[{os.getpid()}]: {line}".encode())
            return
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        text = f"{stamp} criu-tcpcp[{os.getpid()}]: {line}\n".encode()
        with failing("write"):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
                                 | os.O_CLOEXEC, 0o640)
            try:
                if os.write(descriptor, text) != len(text):
                    raise OSError(errno.ENOSPC, "no space for a whole line")
            finally:
                os.close(descriptor)

    def _is_socket(self) -> bool:
        with failing("look"):
            try:
                return stat.S_ISSOCK(os.stat(self._path).st_mode)
            except FileNotFoundError:
                return False
