"""The systemd units: well-formed, and what they start settles a pass whose processes were all killed.

systemd itself does not run in a lab; what it would look at and start is read from the units.
"""

from __future__ import annotations

import configparser
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

from attempt import Attempt, conversation, exchange, state
from criu_tcpcp.lab import Host
from waiting import until
from world import COMMAND

UNITS = Path(__file__).parents[2] / "systemd"
RUN_DIR = "/run/criu-tcpcp/"


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNITS / name)
    return parser


def would_start(name: str, host: Host) -> bool:
    """By its conditions, with the run directory of this host; of those with a `|` one is enough (systemd.unit(5))."""
    words = "ConditionPathExistsGlob="
    conditions = [line.removeprefix(words).removeprefix("|") for line in (UNITS / name).read_text().splitlines()
                  if line.startswith(words)]
    assert all(condition.startswith(RUN_DIR) for condition in conditions)
    return any(any(host.run_dir.glob(condition.removeprefix(RUN_DIR))) for condition in conditions)


def start(name: str, host: Host) -> int:
    """What its ExecStart starts; the exit status."""
    service = unit(name)["Service"]
    command, *words = shlex.split(service["ExecStart"])
    assert command == "criu-tcpcp"
    status = host.run([COMMAND, *words], check=False).returncode
    assert status in {0, *map(int, service.get("SuccessExitStatus", "").split())}
    return status


def test_systemd_takes_them(tmp_path: Path) -> None:
    for file in UNITS.iterdir():  # it would look for the command where it is installed
        (tmp_path / file.name).write_text(file.read_text().replace("=criu-tcpcp ", f"={COMMAND} "))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *map(str, sorted(tmp_path.iterdir()))],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)
    timers = {file.stem for file in UNITS.glob("*.timer")}
    assert timers == {file.stem for file in UNITS.glob("*.service")}


@pytest.mark.root
def test_the_resolve_unit_settles_what_nobody_works_on() -> None:
    """Both processes are killed behind the offer: the program stands still until the timer comes by."""
    with conversation(register=False) as (here, peer):
        exchange(peer, b"before")
        origin, name = here.lab.origin, "criu-tcpcp-resolve.service"
        assert not would_start(name, origin)
        attempt = Attempt(here, "origin:send commit")
        attempt.kill("command", "keeper")
        pid = here.node.process.pid
        until(lambda: state(pid) == "T", "the process to stay stopped")
        assert would_start(name, origin)
        assert start(name, origin) == 1  # it never heard the commit: the origin owns the connection
        assert state(pid) in ("S", "R")
        assert not would_start(name, origin)
        exchange(peer, b"after")
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        assert here.release() == []


@pytest.mark.root
def test_the_release_unit_takes_away_what_a_pass_has_left() -> None:
    with conversation(register=False) as (here, peer):
        exchange(peer, b"before")
        here.pass_once()
        exchange(peer, b"after")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.node.wait_for("end")
        for host in (here.lab.origin, here.lab.destination):
            assert start("criu-tcpcp-release.service", host) == 0
        assert here.release() == []
