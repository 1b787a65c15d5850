"""Whatever dies before the commit, the origin process keeps a working connection; what dies after it is settled.

One test a step and victim: the process that is at the step stops itself just before it (CRIU_TCPCP_STOP_AT), the victim
is ended, and everything goes on. Then the peer and the origin program still talk, nothing is stopped, and after
`release` nothing is left.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from criu_tcpcp.core import handoff
from criu_tcpcp.core.handoff import Action
from waiting import until
from world import COMMAND, PORT, World, world

pytestmark = pytest.mark.root

ORIGIN_BEFORE_OFFER = [*handoff.ORIGIN[handoff.OriginState.READY, handoff.Event.START].actions,
                       *handoff.ORIGIN[handoff.OriginState.PREPARED, handoff.Event.PREPARED].actions]
DESTINATION_BEFORE_COMMIT = [Action.RESTORE, Action.GRAFT, Action.WRITE_PREPARED, Action.SEND_PREPARED]
VICTIMS = ["command", "keeper", "link", "serve", "receiver"]


class Attempt:
    """A pass under way, which is stopped at one step."""

    def __init__(self, here: World, step: str) -> None:
        self.here = here
        side, _, _action = step.partition(":")
        environment = {"CRIU_TCPCP_STOP_AT": step} if side == "origin" else {}
        options = [] if side == "origin" else ["--remote-command", f"env 'CRIU_TCPCP_STOP_AT={step}' {COMMAND}"]
        self.command = here.owner.spawn(here.pass_argv(*options, "--max-stall", "10000"), env=environment,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        name = "tcpcp-keeper" if side == "origin" else "tcpcp-serve"
        until(lambda: self._stopped(name), f"{name} to stop at {step}")

    def _stopped(self, name: str) -> bool:
        assert self.command.poll() is None, self.command.communicate()
        found = self.find(name)
        return bool(found) and state(found[0]) == "T"

    def find(self, name: str) -> list[int]:
        """Processes of this lab by what they call themselves."""
        wanted = {os.stat(host.netns).st_ino for host in (self.here.lab.origin, self.here.lab.destination)}
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and (entry / "comm").read_text().strip() == name \
                        and os.stat(entry / "ns/net").st_ino in wanted:
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def kill(self, victim: str) -> None:
        if victim == "command":
            self.command.kill()
            self.command.wait()
        elif victim == "receiver":
            self.here.nodes[self.here.other.name].end()
        else:
            for pid in self.find(f"tcpcp-{victim}"):
                os.kill(pid, signal.SIGKILL)

    def go_on(self) -> None:
        for name in ("tcpcp-keeper", "tcpcp-serve"):
            for pid in self.find(name):
                os.kill(pid, signal.SIGCONT)

    def outcome(self) -> dict[str, object] | None:
        """The report, unless the command was the victim."""
        out, err = self.command.communicate(timeout=60)
        assert "Traceback" not in err, err
        return dict(json.loads(out)) if out else None


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@contextmanager
def conversation(**options: bool) -> Iterator[tuple[World, socket.socket]]:
    with world("echo", **options) as here, here.lab.peer.enter(), \
            socket.create_connection((str(here.lab.origin.ipv4), PORT), timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        yield here, peer


def exchange(peer: socket.socket, text: bytes) -> None:
    peer.sendall(text)
    got = b""
    while len(got) < len(text):
        data = peer.recv(4096)
        assert data, "end of stream"
        got += data
    assert got == text


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("step", [f"origin:{action.value}" for action in ORIGIN_BEFORE_OFFER]
                         + [f"destination:{action.value}" for action in DESTINATION_BEFORE_COMMIT])
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
        until(lambda: not attempt.find("tcpcp-keeper") and not attempt.find("tcpcp-serve"), "the tool to end")
        exchange(peer, b"after")
        assert state(here.node.process.pid) in ("S", "R")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
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


@pytest.mark.parametrize("victims", [("keeper",), ("link",), ("serve",), ("command", "keeper"), ("keeper", "serve")],
                         ids="+".join)
@pytest.mark.parametrize("step", [f"origin:{action.value}" for action in ORIGIN_AFTER_OFFER]
                         + [f"destination:{action.value}" for action in DESTINATION_AFTER_OFFER])
def test_after_the_offer_the_pass_is_settled_with_one_owner(step: str, victims: tuple[str, ...]) -> None:
    with conversation(register=False) as (here, peer):
        exchange(peer, b"before")
        attempt = Attempt(here, step)
        for victim in victims:
            attempt.kill(victim)
        attempt.go_on()
        report = attempt.outcome()
        until(lambda: not attempt.find("tcpcp-keeper"), "the keeper to end")
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
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end")
        left = here.release()
        assert left == [], "\n".join(left)
