"""Passes between servers that know nothing of them (servers.py)."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attempt import exchange
from waiting import until
from world import PORT, World, world

SERVERS = str(Path(__file__).parent / "servers.py")
#: What the origin's program is to see of a connection that was passed away: an end, not an error.
SEEN = ["--origin-sees", "eof"]
#: Namespaces of processes and mounts.
CONTAINER = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
MODELS = ["blocking", "threads", "handing", "accepting", "select", "poll", "epoll", "epoll-et", "asyncio", "forking",
          "prefork", "reuseport"]


def server(model: str, address: str, *options: str, prefix: Sequence[str] = ()) -> list[str]:
    return [*prefix, sys.executable, SERVERS, model, address, str(PORT), *options]


@contextmanager
def served(origin: list[str], destination: list[str], version: int = 4,
           **options: Any) -> Iterator[tuple[World, socket.socket]]:
    """A conversation of the peer with the origin's program."""
    with world(version=version, programs={"origin": origin, "destination": destination}, **options) as here, \
            here.lab.peer.enter(), \
            socket.create_connection((str(here.lab.origin.address(version)), PORT), timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        exchange(peer, b"before")
        yield here, peer


def finish(here: World, peer: socket.socket) -> None:
    """The program that has the connection hears its end; the peer could not tell, and nothing is left."""
    here_ends = here.node.count("end")
    peer.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    until(lambda: here.node.count("end") > here_ends, "the program to hear the end")
    assert here.node.count("error") == 0, here.node.events
    here.prove()
    assert here.release() == []


def accepted(here: World) -> list[Any]:
    """What accept told the program that has the connection, when it accepted last."""
    return list(here.node.wait_for("serving", here.node.count("serving"))["accepted"])
