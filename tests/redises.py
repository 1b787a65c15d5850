"""Redis servers, and a client that says one command at a time."""

from __future__ import annotations

import socket
from pathlib import Path

from world import PORT


def received(peer: socket.socket) -> bytes:
    data = peer.recv(65536)
    assert data, "end of stream"
    return data


def redis(directory: Path, name: str) -> list[str]:
    data = directory / name
    data.mkdir()
    return ["redis-server", "--port", str(PORT), "--bind", "0.0.0.0", "::", "--protected-mode", "no", "--save", "",
            "--dir", str(data), "--daemonize", "no"]


def ask(peer: socket.socket, *words: str) -> str:
    """One Redis command, and its whole answer (RESP: a line, or a length and that many bytes)."""
    peer.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in words))
    got = b""
    while not _is_whole(got):
        got += received(peer)
    return got.decode().rstrip()


def _is_whole(answer: bytes) -> bool:
    line, end, rest = answer.partition(b"\r\n")
    return bool(end) and (not line.startswith(b"$") or line == b"$-1" or len(rest) == int(line[1:]) + 2)
