"""Whatever dies before the commit, the origin process keeps a working connection; what dies after it is settled.

One test a step and victim (`./dev test --all`; in every run, some of them): the process that is at the step stops
itself just before it (CRIU_TCPCP_STOP_AT), the victim is ended, and everything goes on. Then the peer and the origin
program still talk, nothing is stopped, the peer could not tell, and after `release` nothing is left. What was held when
its holder died is lost, as on any path, and sent again: that is counted, not judged.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import Any

import pytest

from attempt import Attempt, conversation, exchange, state
from criu_tcpcp.core import handoff
from criu_tcpcp.core.handoff import Action
from waiting import until
from world import COMMAND, World

pytestmark = pytest.mark.root

ORIGIN_BEFORE_OFFER = [*handoff.ORIGIN[handoff.OriginState.READY, handoff.Event.START].actions,
                       *handoff.ORIGIN[handoff.OriginState.PREPARED, handoff.Event.PREPARED].actions]
DESTINATION_BEFORE_COMMIT = [Action.RESTORE, Action.GRAFT, Action.WRITE_PREPARED, Action.SEND_PREPARED]
VICTIMS = ["command", "keeper", "link", "serve", "receiver"]


BEFORE_COMMIT = [*(f"origin:{action.value}" for action in ORIGIN_BEFORE_OFFER),
                 *(f"destination:{action.value}" for action in DESTINATION_BEFORE_COMMIT)]


def cases(steps: list[str], victims: list[str], often: int) -> list[Any]:
    """Every victim at every step; `often` of them in every run, in turn, and the others in `./dev test --all`."""
    return [pytest.param(step, victim, id=f"{step}-{victim}",
                         marks=() if (turn - number) % len(victims) < often else pytest.mark.long)
            for number, step in enumerate(steps) for turn, victim in enumerate(victims)]


@pytest.mark.parametrize(("step", "victim"), cases(BEFORE_COMMIT, VICTIMS, 2))
def test_before_the_commit_the_origin_keeps_a_working_connection(step: str, victim: str) -> None:
    with conversation(register=step == "origin:quiesce") as (here, peer):
        exchange(peer, b"before")
        attempt = Attempt(here, step)
        attempt.kill(victim)
        attempt.go_on()
        report = attempt.outcome()
        if report is not None:
            assert report["owner"] == "origin", report
            assert report["exit"] in (1, 3), report
        until(lambda: not attempt.find("tcpcp-keeper") and not attempt.find("tcpcp-serve"), "the tool to end",
              every_s=0.02)
        exchange(peer, b"after")
        assert state(here.node.process.pid) in ("S", "R")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.prove(passes=0, loss_free=False)
        left = here.release()
        assert left == [], "\n".join(left)


ORIGIN_AFTER_OFFER = [*handoff.ORIGIN[handoff.OriginState.OFFERING, handoff.Event.DONE].actions,
                      *handoff.ORIGIN[handoff.OriginState.OFFERED, handoff.Event.COMMITTED].actions,
                      *handoff.ORIGIN[handoff.OriginState.COMMITTED, handoff.Event.ACTIVE].actions]
DESTINATION_AFTER_OFFER = [
    *handoff.DESTINATION[handoff.DestinationState.PREPARED, handoff.Event.COMMIT].actions,
    *handoff.DESTINATION[handoff.DestinationState.CHECKING, handoff.Event.DONE].actions,
    *handoff.DESTINATION[handoff.DestinationState.DECIDING, handoff.Event.DECIDED_COMMITTED].actions,
    *handoff.DESTINATION[handoff.DestinationState.COMMITTED, handoff.Event.DONE].actions]


AFTER_OFFER = [*(f"origin:{action.value}" for action in ORIGIN_AFTER_OFFER),
               *(f"destination:{action.value}" for action in DESTINATION_AFTER_OFFER)]


@pytest.mark.parametrize(("step", "victims"), cases(
    AFTER_OFFER, ["keeper", "serve", "link", "command+keeper", "keeper+serve"], 1))
def test_after_the_offer_the_pass_is_settled_with_one_owner(step: str, victims: str) -> None:
    with conversation(register=False) as (here, peer):
        exchange(peer, b"before")
        attempt = Attempt(here, step)
        for victim in victims.split("+"):
            attempt.kill(victim)
        attempt.go_on()
        report = attempt.outcome()
        until(lambda: not attempt.find("tcpcp-keeper"), "the keeper to end", every_s=0.02)
        settled = here.owner.run([COMMAND, "resolve", "--json"], check=False)
        assert "Traceback" not in settled.stderr, settled.stderr
        owners = {json.loads(line)["owner"] for line in settled.stdout.splitlines()}
        if report is not None and report["owner"] != "unknown":
            owners.add(report["owner"])
        exchange(peer, b"after")
        if here.nodes[here.other.name].count("serving"):
            here.owner = here.other
        assert owners <= {"destination" if here.owner is here.lab.destination else "origin"}, (report, settled)
        states = {name: state(node.process.pid) for name, node in here.nodes.items()}
        assert set(states.values()) <= {"S", "R"}, (states, report, settled)
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.node.wait_for("end")
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        here.prove(passes=int(here.owner is here.lab.destination), loss_free=False)
        left = here.release()
        assert left == [], "\n".join(left)


def cut_off(here: World, attempt: Attempt) -> None:
    """The destination cannot be reached any more."""
    listener = here.lab.destination.run(["ss", "-tlnpH", "sport", "=", "22"]).stdout
    os.kill(int(listener.partition("pid=")[2].split(",")[0]), signal.SIGKILL)
    attempt.kill("link")


def test_in_doubt_the_process_stays_stopped_until_somebody_decides() -> None:
    """The destination cannot be asked: it never heard the commit, but the origin cannot know."""
    with conversation(register=False) as (here, peer):
        exchange(peer, b"before")
        origin, pid = here.lab.origin, here.node.process.pid
        attempt = Attempt(here, "origin:send commit", "--doubt-limit", "3600")
        cut_off(here, attempt)
        for victim in ("command", "keeper"):
            attempt.kill(victim)
        until(lambda: state(pid) == "T", "the process to stay stopped")
        (known,) = map(json.loads, origin.run([COMMAND, "passes", "--json"]).stdout.splitlines())
        assert (known["side"], known["state"], known["rules"]) == ("origin", "in doubt", ["fenced"])
        kept = origin.run([COMMAND, "release"]).stdout
        assert kept == f"kept {known['id']} (origin): its end is not known: criu-tcpcp resolve {known['id']}\n"
        doubt = origin.run([COMMAND, "resolve", "--timeout", "1"], check=False)
        assert doubt.returncode == 6
        assert "connection refused" in doubt.stdout
        assert state(pid) == "T"
        again = origin.run(here.pass_argv(), check=False)  # it would lift the fence when it is undone
        assert again.returncode == 3
        assert f"pass {known['id']} of this connection is not settled" in json.loads(again.stdout)["error"]
        assert state(pid) == "T"
        forced = origin.run([COMMAND, "resolve", known["id"], "--force-origin"], check=False)
        assert forced.returncode == 1
        assert forced.stdout.startswith(f"{known['id']}: origin")
        assert forced.stderr.startswith("criu-tcpcp: warning: ")
        exchange(peer, b"after")
        assert state(pid) in ("S", "R")
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.prove(passes=0, loss_free=False)
        left = here.release()
        assert left == [], "\n".join(left)


@pytest.mark.parametrize("heard", [False, True], ids=["never-committed", "committed"])
def test_doubt_costs_one_connection_and_not_the_server(heard: bool) -> None:
    """The process runs again without the connection; what became of that, the destination says later."""
    with conversation(register=False) as (here, peer):
        exchange(peer, b"before")
        origin, pid = here.lab.origin, here.node.process.pid
        step = "destination:unfence" if heard else "origin:send commit"
        attempt = Attempt(here, step, "--doubt-limit", "0")
        cut_off(here, attempt)
        if heard:
            attempt.kill("serve")
        attempt.go_on()
        until(lambda: state(pid) in ("S", "R"), "the process to run again", every_s=0.02)
        here.node.wait_for("end")  # of this connection, for the program
        report = attempt.outcome()
        assert report is not None
        assert (report["owner"], report["exit"]) == ("unknown", 6)
        assert "the origin process runs again, without this connection: it lives there, or nowhere" in report["notes"]
        (known,) = map(json.loads, origin.run([COMMAND, "passes", "--json"]).stdout.splitlines())
        assert (known["state"], known["rules"]) == ("in doubt", ["fenced"])
        here.lab.destination.start_sshd()
        settled = json.loads(origin.run([COMMAND, "resolve", "--json"], check=False).stdout)
        if heard:
            assert (settled["owner"], settled["exit"]) == ("destination", 0), settled
            here.owner = here.lab.destination
            exchange(peer, b"after")
            peer.shutdown(socket.SHUT_WR)
            assert peer.recv(1) == b""
            here.node.wait_for("end")
        else:
            assert (settled["owner"], settled["exit"]) == ("none", 5), settled
            assert "the connection is lost" in settled["error"]
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        left = here.release()
        assert left == [], "\n".join(left)


def test_a_committed_pass_is_settled_though_its_origin_process_has_gone() -> None:
    """And the connection lives on at the destination, which was interrupted before it was active."""
    with conversation(register=False) as (here, peer):
        exchange(peer, b"before")
        attempt = Attempt(here, "destination:unfence")
        for victim in ("command", "keeper", "serve"):
            attempt.kill(victim)
        origin = here.lab.origin
        origin.run(["sysctl", "-qw", "net.ipv4.tcp_orphan_retries=1"])  # else it takes minutes
        here.node.end()
        settled = origin.run([COMMAND, "resolve", "--json"])
        assert json.loads(settled.stdout)["owner"] == "destination", settled
        here.owner = here.lab.destination
        exchange(peer, b"after")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.node.wait_for("end")
        until(lambda: not origin.run(["ss", "-tnH", "state", "fin-wait-1"]).stdout, "the old endpoint to go",
              every_s=0.1)
        here.prove(passes=1, loss_free=False)
        left = here.release()
        assert left == [], "\n".join(left)
