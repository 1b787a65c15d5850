"""Between programs of others: the destination's own instance answers the peer, which cannot tell."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from programs import KINDS, Kind, ask, redis
from waiting import until
from world import PORT, World, world

pytestmark = pytest.mark.root

HOSTS = ("origin", "destination")
OTHERS = 2  # clients of each program
LONG = pytest.mark.long, pytest.mark.timeout(1800)
PAIRS = [("redis", "redis"), ("nginx", "nginx"), ("http.server", "nginx"), ("haproxy", "haproxy"), ("node", "node"),
         ("go", "go")]
IPV6 = [("redis", "redis", 6, 2), ("nginx", "nginx", 6, 1)]


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


@contextmanager
def others(here: World, kinds: Mapping[str, Kind]) -> Iterator[dict[str, str]]:
    """Other clients of each of the two programs are served all the time, and notice nothing. Yields which of its kind
    each host's program is."""
    own: dict[str, str] = {}
    over = threading.Event()
    problems: list[str] = []
    answered: list[int] = []

    def ask_all_the_time(sock: socket.socket, host: str) -> None:
        answers = 0
        try:
            while not over.wait(0.002):
                assert kinds[host].who(sock) == own[host]
                answers += 1
        except (OSError, AssertionError, http.client.HTTPException) as error:
            problems.append(f"a client of {host}'s, after {answers} answers: {error!r}")
        answered.append(answers)

    with contextlib.ExitStack() as stack:
        for host in (here.lab.origin, here.lab.destination):
            for _ in range(OTHERS):
                with host.enter():
                    sock = stack.enter_context(socket.create_connection((str(host.ipv4), PORT), timeout=20))
                own[host.name] = kinds[host.name].who(sock)
                thread = threading.Thread(target=ask_all_the_time, args=(sock, host.name))
                thread.start()
                stack.callback(thread.join)
                stack.callback(over.set)
        yield own
    assert problems == []
    assert min(answered) > 0, answered


@pytest.mark.parametrize(("origin", "destination", "version", "passes"), [
    *((*pair, 4, 3) for pair in PAIRS), *IPV6, *(pytest.param(*pair, 4, 100, marks=LONG) for pair in PAIRS)])
def test_there_and_back(origin: str, destination: str, version: int, passes: int, tmp_path: Path,
                        package: Callable[[str, str], None]) -> None:
    """By each way that leads through accept. The answers tell whose they are; the logs tell that both programs took the
    client for the real one."""
    kinds = dict(zip(HOSTS, (KINDS[origin], KINDS[destination]), strict=True))
    if "node" in (origin, destination):
        package("nodejs", "node")
    programs = {name: kind.start(tmp_path, name, PORT) for name, kind in kinds.items()}
    with served(programs, version) as (here, peer):
        with others(here, kinds) as own:
            assert own["origin"] != own["destination"]
            assert kinds["origin"].who(peer) == own["origin"]
            for way in itertools.islice(itertools.cycle(("auto", "accept", "listen")), passes):
                names = {"auto": "auto", "listen": f"listen:{PORT}",
                         "accept": f"accept:{here.nodes[here.other.name].process.pid}"}
                here.pass_once("--into", names[way], "--when", "idle:20000", attempts=3)  # clients ask all the time
                assert kinds[here.owner.name].who(peer) == own[here.owner.name]
        for number, (name, kind) in enumerate(kinds.items()):
            until(entered(kind, tmp_path / name / "log", peer, turns=len(range(number, passes + 1, 2))),
                  f"the log of {name}'s program to tell of the peer")
        finish(here, peer)


def entered(kind: Kind, log: Path, peer: socket.socket, turns: int) -> Callable[[], bool]:
    """Whether the log tells so often of this client: at least once in each of its turns with this program."""
    address, port = peer.getsockname()[:2]
    entry = kind.entry.format(address=address, port=port)
    return lambda: not entry or log.read_text().count(entry) >= turns


def test_redis_in_protected_mode_wants_no_connection_from_elsewhere(tmp_path: Path) -> None:
    """It tells so, and closes: found before anything is stopped."""
    protected = [{"no": "yes"}.get(word, word) for word in redis(tmp_path, "destination")]
    with served({"origin": redis(tmp_path, "origin"), "destination": protected}, 4) as (here, peer):
        done = here.owner.run(here.pass_argv(), check=False)
        assert done.returncode == 3
        assert "closes it at once" in done.stdout or "speaks first" in done.stdout
        assert ask(peer, "PING") == "+PONG"
        finish(here, peer, passes=0)
