"""Between programs of others: the destination's own instance answers the peer, which cannot tell."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from redises import ask, received, redis
from world import PORT, World, world

pytestmark = pytest.mark.root

HOSTS = ("origin", "destination")


@contextmanager
def served(programs: Mapping[str, Sequence[str]], version: int) -> Iterator[tuple[World, socket.socket]]:
    """A connection of the peer with the origin's program."""
    with world(version=version, programs=programs) as here, here.lab.peer.enter(), \
            socket.create_connection((str(here.lab.origin.address(version)), PORT), timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        yield here, peer


def finish(here: World, peer: socket.socket, passes: int | None = None) -> None:
    peer.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    here.prove(passes=passes)
    assert here.release() == []


def peer_address(here: World) -> str:
    assert here.flow is not None
    return str(here.flow.peer.address)


def name_of(sock: socket.socket) -> str:
    """As Redis writes it."""
    address, port = sock.getsockname()[:2]
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def run_id(peer: socket.socket) -> str:
    return next(line for line in ask(peer, "INFO", "server").split() if line.startswith("run_id:"))


LONG = pytest.mark.long, pytest.mark.timeout(900)


@pytest.mark.parametrize(("version", "passes"), [(4, 3), (6, 2), pytest.param(4, 100, marks=LONG)])
def test_redis_to_redis(version: int, passes: int, tmp_path: Path) -> None:
    """The run id tells which of the two answers."""
    programs = {name: redis(tmp_path, name) for name in HOSTS}
    with served(programs, version) as (here, peer):
        ids = [run_id(peer)]
        with others(here, run_id):
            for _ in range(passes):
                here.pass_once(attempts=3)
                ids.append(run_id(peer))
        assert ids[0] != ids[1]
        assert ids == [ids[number % 2] for number in range(passes + 1)]
        told = next(word for word in ask(peer, "CLIENT", "INFO").split() if word.startswith("addr="))
        assert told == f"addr={name_of(peer)}"
        finish(here, peer)


@contextmanager
def others(here: World, ask_one: Callable[[socket.socket], str]) -> Iterator[None]:
    """Another client of each of the two programs is served all the time, and notices nothing."""
    over = threading.Event()
    problems: list[str] = []

    def ask_all_the_time(sock: socket.socket) -> None:
        try:
            while not over.wait(0.002):
                ask_one(sock)
        except (OSError, AssertionError) as error:
            problems.append(str(error))

    with contextlib.ExitStack() as stack:
        for host in (here.lab.origin, here.lab.destination):
            with host.enter():
                sock = stack.enter_context(socket.create_connection((str(host.ipv4), PORT), timeout=20))
            thread = threading.Thread(target=ask_all_the_time, args=(sock,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(over.set)
        yield
    assert problems == []


def nginx(directory: Path, name: str) -> list[str]:
    """Two workers; what it serves is its name."""
    data = directory / name
    data.mkdir()
    paths = "".join(f"{kind}_temp_path {data}/{kind};" for kind in (
        "client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (data / "conf").write_text(f"""
        user root; worker_processes 2; daemon off; pid {data}/pid; error_log {data}/errors;
        events {{ }}
        http {{ {paths} access_log {data}/accesses; keepalive_requests 100000;
               server {{ listen {PORT}; listen [::]:{PORT}; location / {{ return 200 {name}; }} }} }}""")
    return ["nginx", "-c", str(data / "conf"), "-e", str(data / "errors")]


def http_server(directory: Path, name: str) -> list[str]:
    data = directory / name
    data.mkdir()
    (data / "index.html").write_text(name)
    return [sys.executable, "-m", "http.server", "--protocol", "HTTP/1.1", "--directory", str(data), str(PORT)]


def get(peer: socket.socket) -> str:
    """The body of the answer to one request on this connection."""
    peer.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
    got = b""
    while b"\r\n\r\n" not in got:
        got += received(peer)
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    length = int(head.lower().partition(b"content-length: ")[2].split()[0])
    while len(body) < length:
        body += received(peer)
    return body.decode()


@pytest.mark.parametrize(("version", "passes"), [(4, 3), (6, 1), pytest.param(4, 100, marks=LONG)])
def test_nginx_to_nginx(version: int, passes: int, tmp_path: Path) -> None:
    programs = {name: nginx(tmp_path, name) for name in HOSTS}
    with served(programs, version) as (here, peer):
        with others(here, get):
            for number in range(passes):
                assert get(peer) == HOSTS[number % 2]
                here.pass_once(attempts=3)
        assert get(peer) == HOSTS[passes % 2]
        finish(here, peer)
    logged = (tmp_path / "destination" / "accesses").read_text()
    assert f"{peer_address(here)} - - [" in logged


def test_a_python_server_to_nginx(tmp_path: Path) -> None:
    programs = {"origin": http_server(tmp_path, "origin"), "destination": nginx(tmp_path, "destination")}
    with served(programs, 4) as (here, peer):
        assert get(peer) == "origin"
        here.pass_once()
        assert get(peer) == "destination"
        here.pass_once()
        assert get(peer) == "origin"
        finish(here, peer)


def test_redis_in_protected_mode_wants_no_connection_from_elsewhere(tmp_path: Path) -> None:
    """It tells so, and closes: found before anything is stopped."""
    protected = [{"no": "yes"}.get(word, word) for word in redis(tmp_path, "destination")[:-2]]
    with served({"origin": redis(tmp_path, "origin"), "destination": protected}, 4) as (here, peer):
        done = here.owner.run(here.pass_argv(), check=False)
        assert done.returncode == 3
        assert "closes it at once" in done.stdout or "speaks first" in done.stdout
        assert ask(peer, "PING") == "+PONG"
        finish(here, peer, passes=0)
