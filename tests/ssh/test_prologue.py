"""A session is rebuilt in the destination's program before it has the connection: what carries over, what does not."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from attempt import Attempt, conversation, exchange
from criu_tcpcp.lab import Host
from grafting import SEEN, finish, served, server
from programs import ask, received, redis
from waiting import until
from world import COMMAND, PORT, World, world

pytestmark = pytest.mark.root


@contextmanager
def redises(directory: Path, *options: str) -> Iterator[tuple[World, socket.socket]]:
    programs = {name: [*redis(directory, name), *options] for name in ("origin", "destination")}
    with world(programs=programs) as here, here.lab.peer.enter(), \
            socket.create_connection((str(here.lab.origin.ipv4), PORT), timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        yield here, peer


#: A busy machine leaves a program few quiet instants, and little time.
PATIENT = ["--when", "idle:20000", "--max-stall", "10000"]


def prologue(directory: Path, *lines: str) -> list[str]:
    path = directory / "prologue"
    path.write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    return ["--prologue", str(path), *PATIENT]


def ends(here: World, peer: socket.socket, passes: int | None = None) -> None:
    peer.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    here.prove(passes=passes)
    assert here.release() == []


def field(peer: socket.socket, name: str) -> str:
    return next(word for word in ask(peer, "CLIENT", "INFO").split() if word.startswith(f"{name}="))[len(name) + 1:]


def reads(peer: socket.socket, wanted: bytes) -> None:
    got = b""
    while len(got) < len(wanted):
        got += received(peer)
    assert got == wanted


def test_a_redis_session_is_rebuilt(tmp_path: Path) -> None:
    """The database, the name and the login, there and back; the peer reads none of the answers."""
    with redises(tmp_path, "--requirepass", "secret") as (here, peer):
        for words in (("AUTH", "secret"), ("SELECT", "3"), ("CLIENT", "SETNAME", "worker"), ("SET", "who", "origin")):
            assert ask(peer, *words) == "+OK"
        said = prologue(tmp_path, "AUTH secret", "SELECT 3", "CLIENT SETNAME worker")
        report = here.pass_once(*said)
        assert report["into"].endswith(f"accepted at 0.0.0.0:{PORT}, prologue answered with 15 bytes")
        assert ask(peer, "GET", "who") == "$-1"
        assert (field(peer, "db"), field(peer, "name")) == ("3", "worker")
        here.pass_once(*said)
        assert ask(peer, "GET", "who") == "$6\r\norigin"
        here.pass_once(*PATIENT)
        assert ask(peer, "GET", "who").startswith("-NOAUTH"), "without the prologue, nobody is logged in"
        for host in (here.lab.origin, here.lab.destination):
            kept = [one.read_bytes() for one in host.run_dir.rglob("*") if one.is_file()]
            assert kept
            assert b"secret" not in b"".join(kept)
        ends(here, peer)


def test_what_redis_keeps_for_a_client_carries_over_only_as_it_is_said_again(tmp_path: Path) -> None:
    """A transaction, a subscription, a pop that waits: none by itself, all by a prologue."""
    with redises(tmp_path) as (here, peer):
        assert ask(peer, "MULTI") == "+OK"
        assert ask(peer, "SET", "x", "1") == "+QUEUED"
        here.pass_once(*prologue(tmp_path, "MULTI", "SET x 1"))
        peer.sendall(b"EXEC\r\n")
        reads(peer, b"*1\r\n+OK\r\n")
        assert ask(peer, "MULTI") == "+OK"
        here.pass_once(*PATIENT)
        assert ask(peer, "EXEC") == "-ERR EXEC without MULTI"

        peer.sendall(b"BLPOP jobs 0\r\n")
        command(here, here.lab.origin, "BLPOP waits", "CLIENT", "LIST", wanted="cmd=blpop")
        here.pass_once(*prologue(tmp_path, "BLPOP jobs 0"), "--when", "now")
        command(here, here.lab.destination, "the push", "LPUSH", "jobs", "one", wanted="1")
        reads(peer, b"*2\r\n$4\r\njobs\r\n$3\r\none\r\n")

        assert ask(peer, "PING") == "+PONG"
        here.pass_once(*prologue(tmp_path, "SUBSCRIBE news"))
        command(here, here.lab.origin, "a subscriber", "PUBLISH", "news", "hello", wanted="1")
        reads(peer, b"*3\r\n$7\r\nmessage\r\n$4\r\nnews\r\n$5\r\nhello\r\n")
        ends(here, peer)


def command(here: World, host: Host, what: str, *words: str, wanted: str) -> None:
    """Of another client."""
    until(lambda: wanted in host.run(["redis-cli", "-p", str(PORT), *words]).stdout, what, every_s=0.05)


@pytest.mark.parametrize(("model", "version", "address", "size"), [
    ("epoll-et", 4, "0.0.0.0", 9), ("threads", 6, "::", 30000), ("forking", 4, "0.0.0.0", 5000),
    ("asyncio", 4, "127.0.0.1", 32768)])
def test_answers_of_any_length_are_dropped(model: str, version: int, address: str, size: int, tmp_path: Path) -> None:
    """The destination's server sends the whole prologue back; its listener may be on loopback."""
    path = tmp_path / "prologue"
    path.write_bytes(bytes(range(1, 201)) * (size // 200) + b"\n" * (size % 200))
    origin = server("threads", "0.0.0.0" if version == 4 else "::")
    with served(origin, server(model, address), version) as (here, peer):
        report = here.pass_once("--into", f"listen:{PORT}", "--prologue", str(path), *SEEN, *PATIENT)
        assert report["into"].endswith(f"prologue answered with {size} bytes")
        exchange(peer, b"there")
        finish(here, peer)


def test_an_empty_prologue_takes_the_greeting_away(tmp_path: Path) -> None:
    path = tmp_path / "prologue"
    path.touch()
    with world(programs={name: server("greet", "0.0.0.0") for name in ("origin", "destination")}) as here, \
            here.lab.peer.enter(), \
            socket.create_connection((str(here.lab.origin.ipv4), PORT), timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        reads(peer, b"220 welcome\r\n")
        here.pass_once("--prologue", str(path), *SEEN, *PATIENT)
        exchange(peer, b"and no second welcome")
        finish(here, peer)


def test_it_is_kept_no_longer_than_an_interrupted_activation_may_need_it(tmp_path: Path) -> None:
    path = tmp_path / "prologue"
    path.write_bytes(b"a password")

    def kept(here: World) -> list[Path]:
        return [one for one in here.lab.destination.run_dir.rglob("*") if one.is_file() and b"word" in one.read_bytes()]

    with served(server("threads", "0.0.0.0"), server("epoll-et", "0.0.0.0")) as (here, peer):
        attempt = Attempt(here, "destination:activate", "--prologue", str(path), *SEEN, "--when", "idle:20000")
        assert len(kept(here)) == 1
        attempt.kill("serve")
        report = attempt.outcome()
        assert report is not None
        here.owner.run([COMMAND, "resolve", "--json"], check=False)
        assert report["owner"] == "destination", report
        assert kept(here) == []
        here.owner = here.lab.destination
        exchange(peer, b"after")
        ends(here, peer, passes=1)


def test_a_receiver_takes_none(tmp_path: Path) -> None:
    path = tmp_path / "prologue"
    path.write_bytes(b"hello")
    with conversation(register=False) as (here, peer):
        done = here.owner.run(here.pass_argv("--prologue", str(path)), check=False)
        report = json.loads(done.stdout)
        assert (report["owner"], report["exit"]) == ("origin", 3), report
        assert "a receiver takes no prologue" in report["error"]
        exchange(peer, b"after")
        ends(here, peer, passes=0)


REFUSALS = {"deaf": "has not read all of the prologue within 5 s",
            "talkative": "does not come to rest after the prologue within 5 s",
            "leaving": "answers the prologue with 5 bytes, and closes the connection"}


@pytest.mark.parametrize("model", REFUSALS)
def test_a_server_that_does_not_take_it_is_refused_and_nothing_is_touched(model: str, tmp_path: Path) -> None:
    path = tmp_path / "prologue"
    path.write_bytes(b"hello")
    with served(server("threads", "0.0.0.0"), server(model, "0.0.0.0")) as (here, peer):
        done = here.owner.run(here.pass_argv("--into", f"listen:{PORT}", "--prologue", str(path)), check=False)
        report = json.loads(done.stdout)
        assert (report["owner"], report["exit"], done.returncode) == ("origin", 3, 3), report
        assert REFUSALS[model] in report["error"], report
        exchange(peer, b"after")
        ends(here, peer, passes=0)
