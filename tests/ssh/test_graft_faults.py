"""Whatever dies in a pass into an unmodified server: that server serves on, and the connection has one owner."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from attempt import Attempt, exchange, state
from criu_tcpcp.core import handoff
from criu_tcpcp.core.handoff import Action
from grafting import SEEN, served, server
from waiting import until
from world import COMMAND, PORT, World

pytestmark = pytest.mark.root

BEFORE = [Action.RESTORE, Action.GRAFT, Action.WRITE_PREPARED, Action.SEND_PREPARED, Action.CHECK_TARGET,
          Action.DECIDE_COMMITTED]
AFTER = [*handoff.DESTINATION[handoff.DestinationState.DECIDING, handoff.Event.DECIDED_COMMITTED].actions,
         *handoff.DESTINATION[handoff.DestinationState.COMMITTED, handoff.Event.DONE].actions]


@contextmanager
def attempted(step: str, **options: Any) -> Iterator[tuple[World, socket.socket, Attempt]]:
    """A pass that waits at a step; at the end the destination's server serves a client of its own, and all is gone."""
    with served(server("threads", "0.0.0.0"), server("epoll-et", "0.0.0.0")) as (here, peer):
        attempt = Attempt(here, step, *SEEN, **options)
        yield here, peer, attempt
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        destination = here.lab.destination
        assert state(here.nodes["destination"].process.pid) in ("S", "R")
        with destination.enter(), socket.create_connection((str(destination.ipv4), PORT), timeout=20) as client:
            exchange(client, b"a client of its own")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.prove(passes=int(here.owner is destination), loss_free=False)
        assert here.release() == []


@pytest.mark.parametrize("action", [
    pytest.param(one, marks=() if one in (Action.GRAFT, Action.SEND_PREPARED) else pytest.mark.long) for one in BEFORE])
def test_serve_dies_before_the_commit(action: Action) -> None:
    with attempted(f"destination:{action.value}") as (here, peer, attempt):
        attempt.kill("serve")
        report = attempt.outcome()
        if report is not None and report["owner"] == "unknown":  # it had been offered
            settled = here.owner.run([COMMAND, "resolve", "--json"], check=False)
            report = json.loads(settled.stdout)
        assert report is not None
        assert report["owner"] == "origin", report
        exchange(peer, b"after")


@pytest.mark.parametrize("action", [
    pytest.param(one, marks=() if one in (Action.UNFENCE, Action.ACTIVATE, Action.WRITE_ACTIVE) else pytest.mark.long)
    for one in AFTER])
def test_serve_dies_after_the_commit(action: Action) -> None:
    with attempted(f"destination:{action.value}") as (here, peer, attempt):
        attempt.kill("serve")
        report = attempt.outcome()
        here.owner.run([COMMAND, "resolve", "--json"], check=False)
        here.owner = here.lab.destination
        assert report is not None
        assert report["owner"] == "destination", report
        exchange(peer, b"after")


@pytest.mark.parametrize("action", [
    pytest.param(one, marks=() if one is Action.ACTIVATE else pytest.mark.long) for one in AFTER])
def test_serve_dies_before_it_has_replaced_a_descriptor(action: Action) -> None:
    """Whoever continues does so: the program had run meanwhile, with the descriptor as it was, or as it is to be."""
    with served(server("threads", "0.0.0.0"), server("spare", "0.0.0.0")) as (here, peer):
        spare, destination = here.nodes["destination"].wait_for("spare"), here.lab.destination
        attempt = Attempt(here, f"destination:{action.value}", "--into", f"pid:{spare['pid']}:{spare['fd']}", *SEEN)
        attempt.kill("serve")
        report = attempt.outcome()
        here.owner.run([COMMAND, "resolve", "--json"], check=False)
        here.owner = destination
        assert report is not None
        assert report["owner"] == "destination", f"{report}"
        exchange(peer, b"after")
        assert here.serving(destination) == [(spare["pid"], spare["fd"])]
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.prove(passes=1, loss_free=False)
        assert here.release() == []


@pytest.mark.parametrize("step", ["destination:send prepared", "origin:verify"])
def test_the_server_does_not_stand_still_for_an_origin_that_hangs(step: str) -> None:
    """It runs again, without the connection, and the pass is undone when the origin comes back."""
    with attempted(step, max_stall_ms=1000) as (here, peer, attempt):
        server_pid = here.nodes["destination"].process.pid
        if step.startswith("destination"):
            keeper, = attempt.find("tcpcp-keeper")
            os.kill(keeper, signal.SIGSTOP)
            for pid in attempt.find("tcpcp-serve"):
                os.kill(pid, signal.SIGCONT)
        journals = here.lab.destination.run_dir / "passes"
        until(lambda: not list(journals.glob("*.destination")), "the destination to undo it by itself", every_s=0.02)
        assert state(server_pid) in ("S", "R")
        attempt.go_on()
        report = attempt.outcome()
        assert report is not None
        assert report["owner"] == "origin", report
        exchange(peer, b"after")


def test_the_program_dies_in_the_freeze() -> None:
    """Before the commit: the origin keeps its connection, and the server's other end has nothing to say."""
    with served(server("threads", "0.0.0.0"), server("threads", "0.0.0.0")) as (here, peer):
        attempt = Attempt(here, "destination:check target", *SEEN)
        server_pid = here.nodes["destination"].process.pid
        os.kill(server_pid, signal.SIGKILL)
        # Its tracer, stopped too, has to collect it; and only one that has died is not given the connection.
        until(lambda: state(server_pid) == "Z", "the program to die", every_s=0.02)
        attempt.go_on()
        report = attempt.outcome()
        assert report is not None
        assert report["owner"] == "origin", report
        exchange(peer, b"after")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.prove(passes=0, loss_free=False)
        assert here.release() == []
