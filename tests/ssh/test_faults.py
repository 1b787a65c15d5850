"""In doubt: what stands still, for how long, who may decide, and what it costs. (Faults at every step are
test_fault_matrix.py's.)"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from attempt import Attempt, conversation, exchange, state
from waiting import until
from world import COMMAND, World

pytestmark = pytest.mark.root


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
        attempt.kill("command", "keeper")
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
        attempt.kill("command", "keeper", "serve")
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


@pytest.mark.parametrize("version", [4, 6])
def test_an_undone_pass_leaves_no_connection_with_a_program_that_hangs(version: int) -> None:
    """A dormant socket in its hands would speak by its timers, as soon as the fence is gone."""
    with conversation(version=version) as (here, peer):
        exchange(peer, b"before")
        attempt = Attempt(here, "origin:write offered")
        destination = here.lab.destination
        assert here.serving(destination)
        with paused(here.nodes[destination.name].process.pid):
            attempt.kill("command", "keeper")
            until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
            assert here.serving(destination) == []
            exchange(peer, b"after")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.node.wait_for("end")
        here.prove(changes=False, passes=0)
        left = here.release()
        assert left == [], "\n".join(left)


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def rebooted(directory: Path) -> str:
    """A shell command line that runs the tool as after a reboot: the kernel's boot id is another one."""
    boot_id = directory / "boot_id"
    boot_id.write_text("00000000-0000-4000-8000-000000000000\n")
    mount = f"mount --bind {boot_id} /proc/sys/kernel/random/boot_id"
    return f'exec unshare --mount sh -c \'{mount} && exec "$0" "$@"\' {COMMAND}'


def test_a_destination_that_was_rebooted_does_not_have_it(tmp_path: Path) -> None:
    """It may have committed before: what it had is gone with its kernel, and the origin still has everything."""
    tool = tmp_path / "tool"
    tool.write_text(f'#!/bin/sh\nexec {COMMAND} "$@"\n')
    tool.chmod(0o755)
    with conversation(register=False) as (here, peer):
        exchange(peer, b"before")
        destination, pid = here.lab.destination, here.node.process.pid
        attempt = Attempt(here, "origin:send commit", "--remote-command", str(tool))
        attempt.kill("command", "keeper", "serve", "receiver")
        tool.write_text(f'#!/bin/sh\n{rebooted(tmp_path)} "$@"\n')
        destination.run(["nft", "flush", "ruleset"])
        destination.run(["ip", "rule", "del", "pref", "90"])
        destination.run(["ip", "route", "flush", "table", "31900"])
        shutil.rmtree(destination.run_dir / "passes")
        settled = json.loads(here.owner.run([COMMAND, "resolve", "--json"], check=False).stdout)
        assert (settled["owner"], settled["exit"]) == ("origin", 1), settled
        assert state(pid) in ("S", "R")
        exchange(peer, b"after")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.prove(passes=0, loss_free=False)
        assert here.release() == []


def test_an_origin_that_was_rebooted_has_only_the_record_left(tmp_path: Path) -> None:
    """Where the run directory outlives the kernel: there is nothing to give back, and nobody to ask for it."""
    with conversation(register=False) as (here, peer):
        exchange(peer, b"before")
        origin = here.lab.origin
        attempt = Attempt(here, "origin:send commit")
        attempt.kill("command", "keeper")
        here.node.process.kill()
        origin.run(["nft", "flush", "ruleset"])
        tool = ["sh", "-c", f'{rebooted(tmp_path)} "$@"', "sh"]
        (known,) = map(json.loads, origin.run([*tool, "passes", "--json"]).stdout.splitlines())
        assert known["state"] == "of an earlier boot"
        settled = origin.run([*tool, "resolve", known["id"], "--json"], check=False)
        assert (json.loads(settled.stdout)["owner"], settled.returncode) == ("none", 5), settled
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        assert origin.run([*tool, "release", known["id"], "--force"]).stdout == f"released {known['id']} (origin)\n"
        assert origin.run([*tool, "passes", "--json"]).stdout == ""


def test_two_that_settle_the_same_pass_do_not_meet() -> None:
    with conversation(register=False) as (here, peer):
        exchange(peer, b"before")
        origin = here.lab.origin
        attempt = Attempt(here, "origin:send commit")
        attempt.kill("command", "keeper")
        first = origin.spawn([COMMAND, "resolve", "--json"], env={"CRIU_TCPCP_STOP_AT": "resolve:send query"},
                             stdout=subprocess.PIPE, text=True)
        until(lambda: state(first.pid) == "T", "the first to stop before it asks", every_s=0.02)
        (known,) = map(json.loads, origin.run([COMMAND, "passes", "--json"]).stdout.splitlines())
        second = origin.run([COMMAND, "resolve", known["id"]], check=False)
        assert second.returncode == 6
        assert second.stderr.count("\n") == 1
        assert "another process is settling" in second.stderr
        first.send_signal(signal.SIGCONT)
        assert json.loads(first.communicate(timeout=60)[0])["owner"] == "origin"
        assert origin.run([COMMAND, "resolve"]).stdout == "no pass is in doubt\n"
        exchange(peer, b"after")
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        assert here.release() == []
