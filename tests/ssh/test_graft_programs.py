"""Between programs of others: the destination's own instance answers the peer, which cannot tell."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from world import PORT, world

pytestmark = pytest.mark.root


def redis(directory: Path, name: str) -> list[str]:
    data = directory / name
    data.mkdir()
    return ["redis-server", "--port", str(PORT), "--bind", "0.0.0.0", "::", "--protected-mode", "no", "--save", "",
            "--dir", str(data), "--daemonize", "no"]


def ask(peer: socket.socket, *words: str) -> str:
    """One Redis command, and its whole answer (RESP: a line, or a length and that many bytes)."""
    peer.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in words))
    got = b""
    while b"\r\n" not in got or (got[:1] == b"$" and len(got) < len(got.split(b"\r\n")[0]) + 4
                                 + int(got.split(b"\r\n")[0][1:])):
        data = peer.recv(65536)
        assert data, "end of stream"
        got += data
    return got.decode().rstrip()


def run_id(peer: socket.socket) -> str:
    return next(line for line in ask(peer, "INFO", "server").split() if line.startswith("run_id:"))


@pytest.mark.parametrize("version", [4, 6])
def test_redis_to_redis(version: int, tmp_path: Path) -> None:
    programs = {name: redis(tmp_path, name) for name in ("origin", "destination")}
    with world(version=version, programs=programs) as here, here.lab.peer.enter(), \
            socket.create_connection((str(here.lab.origin.address(version)), PORT), timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        ids = [run_id(peer)]
        for _ in range(3):
            here.pass_once()
            ids.append(run_id(peer))
        assert ids[0] == ids[2] != ids[1] == ids[3]
        told = next(word for word in ask(peer, "CLIENT", "INFO").split() if word.startswith("addr="))
        assert told.removeprefix("addr=").rpartition(":")[2] == str(peer.getsockname()[1])
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.prove()
        assert here.release() == []


def test_redis_in_protected_mode_wants_no_connection_from_elsewhere(tmp_path: Path) -> None:
    """It tells so, and closes: found before anything is stopped."""
    protected = [{"no": "yes"}.get(word, word) for word in redis(tmp_path, "destination")[:-2]]
    with world(programs={"origin": redis(tmp_path, "origin"), "destination": protected}) as here, \
            here.lab.peer.enter(), \
            socket.create_connection((str(here.lab.origin.ipv4), PORT), timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        done = here.owner.run(here.pass_argv(), check=False)
        assert done.returncode == 3
        assert "closes it at once" in done.stdout or "speaks first" in done.stdout
        assert ask(peer, "PING") == "+PONG"
        assert here.release() == []
