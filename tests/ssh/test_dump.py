"""`dump` and `show`: what is in the images is the connection, and whatever fails, somebody has it."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from attempt import Attempt, conversation, exchange, state
from criu_tcpcp import api, imagedir
from criu_tcpcp.core import imageset, snapshot
from criu_tcpcp.core.criu import messages
from criu_tcpcp.core.handoff import Event, OriginState
from criu_tcpcp.core.image import Image, decode
from criu_tcpcp.core.state import ConnectionState
from waiting import until
from world import COMMAND, World

pytestmark = pytest.mark.root

REFUSED, UNDONE = 3, 1


def dump_argv(here: World, place: Path, *options: str) -> list[str]:
    return [COMMAND, "dump", "--json", "--pid", str(here.node.process.pid), "--fd", str(here.descriptor()),
            "-D", str(place), *options]


def dump(here: World, place: Path, *options: str) -> dict[str, Any]:
    done = here.lab.origin.run(dump_argv(here, place, *options), check=False)
    assert done.returncode == 0, done
    return dict(json.loads(done.stdout))


def crit(path: Path) -> dict[str, Any]:
    """What CRIU's own tool reads in an image."""
    return dict(json.loads(subprocess.run(["crit", "show", str(path)], capture_output=True, text=True,
                                          check=True).stdout))


def dumped_state(place: Path) -> ConnectionState:
    files = imagedir.read(place)
    (one,) = json.loads(files[imageset.OURS])["connections"]
    entry = messages().file.FromString(files["files.img"][12:]).isk
    return decode(Image(entry.SerializeToString(), files[imageset.stream_name(one["inode"])],
                        json.dumps(one["extras"]).encode()))


def only_the_directory(place: Path) -> bool:
    return [one.name for one in place.parent.iterdir()] == [place.name]


def finish(here: World, peer: socket.socket) -> None:
    exchange(peer, b"after")
    assert state(here.node.process.pid) in ("S", "R")
    peer.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    here.node.wait_for("end")
    assert here.release() == []


@pytest.mark.parametrize("register", [False, True], ids=["any program", "registered"])
def test_a_connection_that_is_only_read_goes_on(tmp_path: Path, register: bool) -> None:
    place = tmp_path / "images"
    with conversation(register=register) as (here, peer):
        exchange(peer, b"before")
        before = here.counters()
        inode = int(os.readlink(f"/proc/{here.node.process.pid}/fd/{here.descriptor()}")[8:-1])
        report = dump(here, place, "--leave-running")
        assert (report["owner"], report["exit"], report["into"]) == ("origin", 0, f"images {place}")
        exchange(peer, b"between")
        dump(here, tmp_path / "again", "-R")
        assert sorted(one.name for one in tmp_path.iterdir()) == ["again", "images"]
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert {stat.S_IMODE(one.stat().st_mode) for one in place.iterdir()} == {0o600}

        socket_entry = crit(place / "files.img")["entries"][0]["isk"]
        assert (socket_entry["ino"], socket_entry["src_port"]) == (inode, 9000)
        assert socket_entry["src_addr"] == [str(here.lab.origin.ipv4)]
        assert crit(place / "fdinfo-1.img")["entries"][0]["fd"] == here.descriptor()
        assert crit(place / "inventory.img")["entries"] == [{"img_version": 2}]
        stream = crit(place / f"tcp-stream-{inode:x}.img")["entries"][0]
        assert (stream["inq_len"], stream["outq_len"]) == (0, 0)
        later = crit(tmp_path / "again" / f"tcp-stream-{inode:x}.img")["entries"][0]
        assert later["inq_seq"] - stream["inq_seq"] == len(b"between")

        shown = json.loads(here.lab.origin.run([COMMAND, "show", "--json", "-D", str(place)]).stdout)
        assert here.flow is not None
        assert (shown["local"], shown["peer"]) == (str(here.flow.local), str(here.flow.peer))
        assert (shown["state"], shown["whole"], shown["problem"]) == ("ESTAB", True, None)
        assert shown["processes"][0]["fds"] == [here.descriptor()]
        assert "payload" not in shown
        finish(here, peer)
        verdict = here.verdict(before)
        assert verdict.violations == (), "\n".join(map(str, verdict.violations[:20]))


@pytest.mark.parametrize("version", [4, 6])
def test_a_connection_that_is_taken_lives_in_the_images(tmp_path: Path, version: int) -> None:
    """The peer hears nothing until somebody makes the connection again; then it goes on, with what it had sent."""
    place = tmp_path / "images"
    place.mkdir()
    with conversation(register=False, version=version) as (here, peer):
        exchange(peer, b"before")
        origin = here.lab.origin
        report = dump(here, place)
        assert (report["owner"], report["exit"]) == ("none", 0)
        here.node.wait_for("end")  # the program's descriptor is dead
        (known,) = map(json.loads, origin.run([COMMAND, "passes", "--json"]).stdout.splitlines())
        assert (known["id"], known["state"], known["rules"]) == (report["id"], "done", ["fenced"])
        peer.sendall(b"into the void")
        kept = origin.run([COMMAND, "release"]).stdout
        assert kept.startswith(f"kept {report['id']} (origin): its state lies in {place}")

        with origin.enter():
            dormant = api.create(dumped_state(place))
            assert origin.run([COMMAND, "release", report["id"]]).stdout == f"released {report['id']} (origin)\n"
            sock = api.activate(dormant)
        with sock:
            sock.settimeout(20)
            assert sock.recv(100) == b"into the void"
            sock.sendall(b"out of it")
            assert peer.recv(100) == b"out of it"
            peer.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
        assert peer.recv(1) == b""
        assert here.release() == []
        verdict = here.verdict(loss_free=False)  # the peer had to send again
        assert verdict.violations == (), "\n".join(map(str, verdict.violations[:20]))


def test_a_connection_that_came_from_another_host_is_not_sent_back_there(tmp_path: Path) -> None:
    with conversation(register=False) as (here, peer):
        exchange(peer, b"before")
        here.pass_once()
        exchange(peer, b"after")
        destination = here.lab.destination
        done = destination.run(dump_argv(here, tmp_path / "images"), check=False)
        assert done.returncode == 0, done
        dump_id = json.loads(done.stdout)["id"]
        known = {one["id"]: one for one in map(json.loads, destination.run([COMMAND, "passes", "--json"])
                                               .stdout.splitlines())}
        assert known[dump_id]["rules"] == ["fenced"]
        here.node.wait_for("end")
        peer.sendall(b"into the void")
        segments = here.counters()["TcpRetransSegs"]
        until(lambda: here.counters()["TcpRetransSegs"] > segments + 1, "the peer to send it again", every_s=0.05)
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        verdict = here.verdict(loss_free=False)
        assert verdict.violations == (), "\n".join(map(str, verdict.violations[:20]))
        for number in (dump_id, ""):
            destination.run([COMMAND, "release", *([number] if number else [])])
        assert [line for line in here.release() if here.lab.destination.name in line] == []


def test_what_waits_in_the_queues_is_in_the_images(tmp_path: Path) -> None:
    place = tmp_path / "images"
    with conversation(register=False, captured=False) as (here, peer):
        exchange(peer, b"before")
        os.kill(here.node.process.pid, signal.SIGSTOP)
        until(lambda: state(here.node.process.pid) == "T", "the program to stop")
        peer.sendall(b"the secret")
        until(lambda: here.queued()[0] == 10, "the bytes to arrive")
        dump(here, place, "-R", "--when", "now")
        assert dumped_state(place).received == b"the secret"
        show = [COMMAND, "show", "-D", str(place)]
        for options in ([], ["--json"]):
            assert "secret" not in here.lab.origin.run([*show, *options]).stdout
        assert "received: b'the secret'" in here.lab.origin.run([*show, "--payload"]).stdout
        os.kill(here.node.process.pid, signal.SIGCONT)
        got = b""
        while len(got) < 10:
            got += peer.recv(100)
        finish(here, peer)


# -- what cannot be ----------------------------------------------------------------------------------------------------

def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "elsewhere").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with conversation(register=False, captured=False) as (here, peer):
        exchange(peer, b"before")
        for options in ([], ["-R"]):
            for name, words in (("full", "is not empty"), ("file", "is not a directory"),
                                ("link", "is not a directory"),
                                ("no/where", "there is no directory"), ("../" * 40, "cannot be the directory"),
                                ("/proc", "is a mount point"), ("/proc/no", "cannot ")):
                argv = [word for word in dump_argv(here, tmp_path / name, *options) if word != "--json"]
                done = here.lab.origin.run(argv, check=False)
                assert (done.returncode, done.stdout) == (REFUSED, ""), done
                (line,) = done.stderr.splitlines()
                assert words in line
                assert "the origin" in line
                assert "has the connection" in line or "has its connection" in line
        assert sorted(tmp_path.rglob("*")) == before
        finish(here, peer)


@pytest.mark.parametrize("options", [[], ["-R"]], ids=["taken", "read"])
def test_a_full_disk(tmp_path: Path, options: list[str]) -> None:
    """A file size limit (EFBIG), and a file system that has room for the first files only."""
    place = tmp_path / "disk" / "images"
    place.parent.mkdir()
    with conversation(register=False, captured=False) as (here, peer):
        exchange(peer, b"before")
        for limit in (0, 20, 300):
            limited = ["prlimit", f"--fsize={limit}", *dump_argv(here, place, *options)]
            done = here.lab.origin.run(limited, check=False)
            assert json.loads(done.stdout)["owner"] == "origin", done
            assert done.returncode in (UNDONE, REFUSED), done
            assert list(place.parent.iterdir()) == []
            exchange(peer, b"still")
        script = (f'mount -t tmpfs -o nr_inodes=4 none {place.parent} && "$@"; status=$?; ls -A {place.parent}; '
                  'exit $status')
        done = here.lab.origin.run(["unshare", "--mount", "bash", "-c", script, "-", *dump_argv(here, place, *options)],
                                   check=False)
        (line,) = done.stdout.splitlines()  # and nothing in the directory
        assert "No space left on device" in json.loads(line)["error"]
        assert json.loads(line)["owner"] == "origin"
        assert done.returncode in (UNDONE, REFUSED), done
        finish(here, peer)


# -- whatever dies -----------------------------------------------------------------------------------------------------

READING = [action.value for action in snapshot.SNAPSHOT[OriginState.READY, Event.START].actions] + ["undo"]


@pytest.mark.parametrize("step", [
    pytest.param(step, marks=() if number % 2 else pytest.mark.long) for number, step in enumerate(READING)])
def test_a_reading_that_is_killed(tmp_path: Path, step: str) -> None:
    place = tmp_path / "images"
    with conversation(register=step == "quiesce", captured=False) as (here, peer):
        exchange(peer, b"before")
        attempt = Attempt(here, f"origin:{step}", argv=dump_argv(here, place, "-R", "--max-stall", "10000"))
        if step in ("extract", "undo"):
            attempt.kill("command")
        attempt.kill("keeper")
        attempt.go_on()
        report = attempt.outcome()
        if report is not None:
            assert (report["owner"], report["exit"]) == ("origin", UNDONE)
        until(lambda: not attempt.find("tcpcp-keeper"), "the tool to end", every_s=0.02)
        assert not place.exists()
        exchange(peer, b"between")
        here.lab.origin.run([COMMAND, "release"])
        assert list(tmp_path.iterdir()) == []
        finish(here, peer)


TAKING = ["origin:extract", "origin:write offered", "destination:graft", "destination:send prepared",
          "origin:send commit", "destination:decide committed", "destination:activate", "destination:write active",
          "origin:redirect", "origin:write done"]


VICTIMS = ["keeper", "serve", "command+keeper", "command+keeper+serve"]


@pytest.mark.parametrize(("step", "victims"), [
    pytest.param(step, victims, marks=() if (turn - number) % len(VICTIMS) == 0 else pytest.mark.long)
    for number, step in enumerate(TAKING) for turn, victims in enumerate(VICTIMS)])
def test_a_taking_that_is_killed_has_one_owner(tmp_path: Path, step: str, victims: str) -> None:
    place = tmp_path / "images"
    with conversation(register=False, captured=False) as (here, peer):
        exchange(peer, b"before")
        origin = here.lab.origin
        attempt = Attempt(here, step, argv=dump_argv(here, place, "--max-stall", "10000"))
        for victim in victims.split("+"):
            attempt.kill(victim)
        attempt.go_on()
        attempt.outcome()
        until(lambda: not attempt.find("tcpcp-keeper") and not attempt.find("tcpcp-serve"), "the tool to end",
              every_s=0.02)
        for line in origin.run([COMMAND, "passes", "--json"]).stdout.splitlines():
            if json.loads(line)["side"] == "origin":
                origin.run([COMMAND, "resolve", json.loads(line)["id"]], check=False)
        origin.run([COMMAND, "release"])
        if place.exists():
            assert dumped_state(place).flow == here.flow
            here.node.wait_for("end")
            assert only_the_directory(place)
            (known,) = map(json.loads, origin.run([COMMAND, "passes", "--json"]).stdout.splitlines())
            assert known["state"] == "done"
            origin.run([COMMAND, "release", known["id"]])
            assert here.release() == []
        else:
            assert list(tmp_path.iterdir()) == []
            finish(here, peer)
