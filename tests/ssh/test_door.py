"""`serve` as a guarded door: a key that sshd forces upon it passes what the policy allows, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from attempt import Attempt, conversation, exchange
from criu_tcpcp.core import messages
from criu_tcpcp.core.endpoint import Endpoint
from criu_tcpcp.core.image import encode
from criu_tcpcp.core.options import BY_NAME
from criu_tcpcp.lab import leftovers
from doors import Door, Voice, changed
from grafting import SEEN, server
from states import plain
from waiting import until
from world import COMMAND, PORT, World, world

pytestmark = pytest.mark.root

DENIED = "the policy of the destination does not allow this"
REFUSED = f"{DENIED}; nothing was touched, the origin process still has its connection"
PYTHON = str(Path(sys.executable).resolve())


def finish(here: World, peer: socket.socket, passes: int = 1, **how: Any) -> None:
    peer.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    here.node.wait_for("end")
    here.prove(passes=passes, **how)
    assert here.release() == []


def try_to_pass(here: World, *options: str) -> dict[str, Any]:
    done = here.owner.run(here.pass_argv(*options), check=False)
    report = json.loads(done.stdout)
    assert report["exit"] == done.returncode
    return dict(report)


def test_what_the_policy_allows_is_passed_and_audited(tmp_path: Path) -> None:
    with conversation(register=False) as (here, peer), Door(here, changed(executables=[PYTHON])) as door:
        exchange(peer, b"a marker that no audit has")
        origin, ran = here.lab.origin, tmp_path / "ran"
        # What the origin asks sshd to run is not run: the door is, whatever --remote-command says.
        report = here.pass_once("--remote-command", f"touch {ran}; false")
        assert not ran.exists()
        about = {"pass": report["id"], "key": "web1", "flow": report["connection"], "way": "auto", "rule": "sessions",
                 "program": report["into"]}
        assert door.audited() == {"verdict": "accepted", **about, "user": "0", "executable": PYTHON}
        assert door.audited() == {"verdict": "active", **about}
        exchange(peer, b"after")
        assert "its connection is alive" in origin.run([COMMAND, "release"]).stdout
        assert origin.run([COMMAND, "check", *door.options]).stdout.endswith("Looks good.\n")
        finish(here, peer)


#: What is not allowed -> the rule that leaves it out, options of the pass, and what the audit says of it.
DENIALS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "local": ({"local": ["10.77.3.0/24"]}, [], "the local address 10.77.2.11"),
    "local port": ({"local_ports": [9001]}, [], "the local port 9000"),
    "peer": ({"peers": ["10.77.1.9"]}, [], "the peer 10.77.1.2"),
    "peer's port": ({"peer_ports": ["1-1023"]}, [], "the peer's port "),
    "user": ({"users": ["nobody", 33]}, [], "the user 0 of the program"),
    "executable": ({"executables": ["/bin/sh"]}, [], f"the executable {PYTHON}"),
    "port": ({"ports": [9001]}, [], "a program at the port 9000"),
    "another port": ({}, ["--into", "listen:22"], "a program at the port 22"),
    "a process": ({"executables": ["/bin/sh"]}, ["--into", "accept:1"], "the executable "),
    "no process": ({}, ["--into", "pid:4194303:0"], "a program that waits at no port"),
    "a path": ({}, ["--into", "receiver:/run/some.sock"], "a program that waits at no port"),
}


def test_what_it_does_not_allow_is_denied_and_nothing_is_touched() -> None:
    with conversation(register=False) as (here, peer), Door(here, changed()) as door:
        destination = here.lab.destination
        before = leftovers(destination)
        for rule, options, what in DENIALS.values():
            door.allow(changed(**rule))
            report = try_to_pass(here, *options)
            assert (report["owner"], report["exit"], report["error"]) == ("origin", 3, REFUSED), what
            told = door.audited()
            assert (told["verdict"], told["key"], told["flow"]) == ("denied", "web1", str(here.flow))
            assert told["reason"].startswith(f"rule sessions does not allow {what}"), (told, what)
            assert "rule" not in told
            assert leftovers(destination) == before
        exchange(peer, b"still there")
        door.allow(changed())
        here.pass_once()
        finish(here, peer)


def test_a_key_that_no_rule_names_is_sent_away_at_the_greeting() -> None:
    with conversation(register=False, captured=False) as (here, peer), \
            Door(here, changed(), key="web2") as door:
        report = try_to_pass(here)
        assert (report["owner"], report["exit"]) == ("origin", 3)
        assert report["error"] == f"the destination refuses: {REFUSED}"
        assert door.audited() == {"verdict": "denied", "key": "web2", "reason": "no rule names the key web2"}
        done = here.lab.origin.run([COMMAND, "check", *door.options], check=False)
        assert (done.returncode, DENIED in done.stderr) == (3, True)
        exchange(peer, b"still there")


def test_a_policy_that_cannot_be_used_lets_nobody_in(tmp_path: Path) -> None:
    with conversation(register=False, captured=False) as (here, peer), Door(here, changed()) as door:
        def refused(mode: int, text: str) -> None:
            door.policy.write_text(text)
            door.policy.chmod(mode)
            report = try_to_pass(here)
            assert (report["owner"], report["exit"]) == ("origin", 3)
            assert "the policy of the destination cannot be used" in report["error"]
            assert str(door.policy) not in json.dumps(report)
        good = door.policy.read_text()
        refused(0o646, good)
        refused(0o664, good)
        refused(0o644, good + "\nsurprise = 1")
        # Without an audit nothing is let in either.
        refused_report = good.replace(str(door.log), str(tmp_path / "no" / "such" / "log"))
        door.policy.write_text(refused_report)
        door.policy.chmod(0o644)
        report = try_to_pass(here)
        assert (report["exit"], "cannot write its audit log" in report["error"]) == (3, True)
        file = tmp_path / "log.txt"
        door.policy.write_text(good.replace(str(door.log), str(file)))
        here.pass_once()
        assert [" verdict=\"accepted\" " in line for line in file.read_text().splitlines()] == [True, False]
        exchange(peer, b"passed")


def test_no_more_at_once_than_the_limit() -> None:
    with conversation(register=False, captured=False) as (here, peer), \
            Door(here, changed(limit=1)) as door:
        lab, flow = here.lab, here.flow
        here.pass_once()
        here.owner = lab.origin
        with socket.create_connection((str(lab.origin.ipv4), PORT), timeout=20) as second:
            here.knows_peer(second.getsockname()[1])
            until(lambda: here.nodes["origin"].count("serving") == 2, "the second connection")
            report = try_to_pass(here)
            assert (report["exit"], report["error"]) == (3, REFUSED)
            told = [door.audited()["verdict"], door.audited()["verdict"], door.audited()["reason"]]
            assert told == ["accepted", "active", "rule sessions allows 1 connections at once, and has them"]
            exchange(second, b"still there")
            peer.shutdown(socket.SHUT_WR)
            assert peer.recv(1) == b""
            here.nodes["destination"].wait_for("end")
            assert flow is not None
            here.pass_once()
            exchange(second, b"now it is its turn")


@pytest.mark.parametrize(("step", "owner"), [("origin:send commit", "origin"), ("origin:redirect", "destination")])
def test_a_pass_in_doubt_is_settled_through_the_door(step: str, owner: str) -> None:
    with conversation(register=False) as (here, peer), Door(here, changed()) as door:
        exchange(peer, b"before")
        attempt = Attempt(here, step)
        attempt.kill("command", "keeper", "serve")
        (settled,) = map(json.loads, here.lab.origin.run([COMMAND, "resolve", "--json"], check=False)
                         .stdout.splitlines())
        assert settled["owner"] == owner
        assert door.audited()["verdict"] == "accepted"
        exchange(peer, b"after")
        if owner == "destination":
            here.owner = here.lab.destination
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        finish(here, peer, passes=int(owner == "destination"), loss_free=False)


def test_a_key_asks_about_its_own_passes_only() -> None:
    rules = {**changed(), "others": changed(keys=["web2"], peers=["192.0.2.0/24"])["sessions"]}
    with conversation(register=False) as (here, peer), Door(here, rules) as door:
        exchange(peer, b"before")
        report = here.pass_once()
        assert here.flow is not None
        pass_id, flow, unknown = report["id"], here.flow.to_json(), "0123456789abcdef"
        record = here.lab.destination.run_dir / "passes" / f"{pass_id}.destination" / "log"
        before = record.read_text()
        with Voice(door, "web2") as other:
            for question in (messages.Query(pass_id), messages.Settled(pass_id), messages.Ask(pass_id, flow),
                             messages.Ask(unknown, flow), messages.Ask(pass_id, {**flow, "peer": ["192.0.2.1", 9]})):
                answer = other.ask(question)
                assert isinstance(answer, messages.Refused), question
                assert answer.reason == DENIED
            assert isinstance(other.ask(messages.Query(unknown)), messages.Aborted)
        assert record.read_text() == before
        with Voice(door, "web1") as own:
            assert own.ask(messages.Ask(pass_id, flow)) == messages.Standing(pass_id, True)
            assert isinstance(own.ask(messages.Query(pass_id)), messages.Active)
        finish(here, peer)


def test_addresses_that_nobody_can_pass_are_refused_whatever_the_policy_says() -> None:
    anything = changed(local="any", peers="any", local_ports="any", peer_ports="any", ports="any")
    with conversation(register=False, captured=False) as (here, _peer), Door(here, anything) as door:
        assert here.flow is not None
        flow = dataclasses.replace(here.flow, local=Endpoint(here.lab.destination.ipv4, PORT))
        bad = [("local", "127.0.0.1"), ("peer", "127.0.0.1"), ("peer", "224.0.0.1"), ("peer", "0.0.0.0"),
               ("peer", str(here.lab.destination.ipv4))]
        inet_sk = encode(plain()).inet_sk
        flows = [{**flow.to_json(), end: [address, 40000]} for end, address in bad]
        with here.lab.destination.enter(), socket.create_server((str(here.lab.destination.ipv4), 0)) as listener, \
                here.lab.peer.enter(), socket.create_connection(listener.getsockname()) as there:
            existing = {**flow.to_json(), "local": list(listener.getsockname()), "peer": list(there.getsockname())}
            with Voice(door, "web1") as voice:
                for number, one in enumerate([*flows, existing]):
                    answer = voice.ask(messages.Stage(f"{number:016x}", one, "auto", "auto", inet_sk, 500))
                    assert isinstance(answer, messages.Refused), one
                    assert "cannot live here" in answer.reason or "itself" in answer.reason \
                        or "already" in answer.reason, answer
                    assert door.audited()["verdict"] == "refused"


@pytest.mark.parametrize(("name", "value"), [("SO_MARK", 5), ("SO_BINDTODEVICE", "eth0"), ("IP_OPTIONS", "01010100")])
def test_a_socket_does_not_bring_its_own_way_through_the_host(name: str, value: int | str) -> None:
    """Neither as the origin announces it, nor where the state has it all the same, or is the first to tell."""
    with conversation(register=False, captured=False) as (here, _peer), \
            Door(here, changed(executables=[PYTHON])) as door:
        assert here.flow is not None
        honest, flow = plain(flow=here.flow), here.flow.to_json()
        image = encode(dataclasses.replace(honest, options={**honest.options, name: value}))
        with Voice(door, "web1") as voice:
            if BY_NAME[name].criu is not None:
                told = voice.ask(messages.Stage("0" * 16, flow, "auto", "auto", image.inet_sk, 500))
                assert isinstance(told, messages.Refused)
                assert told.reason == DENIED
                assert name in door.audited()["reason"]
            staged = voice.ask(messages.Stage("1" * 16, flow, "auto", "auto", encode(honest).inet_sk, 500))
            assert isinstance(staged, messages.Staged), staged
            assert door.audited()["verdict"] == "accepted"
            lie = messages.Prepare("1" * 16, staged.nonce, image.inet_sk, image.tcp_stream, image.extras, b"")
            undone = voice.ask(lie)
            assert isinstance(undone, messages.Aborted), undone
            assert undone.reason.startswith(DENIED)
            ended = door.audited()
            assert (ended["verdict"], name in ended["reason"]) == ("undone", True), ended


# -- no confused deputy ------------------------------------------------------------------------------------------------

#: Two users accept on one port, and the kernel chooses. Each says what it reads, and back.
TWO_USERS = f"""
import json, os, socket, threading
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
listener.bind(("0.0.0.0", {PORT}))
other = socket.socket()
other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
other.bind(("0.0.0.0", {PORT}))
user = 33 if os.fork() else 34
(listener if user == 33 else other).listen()
(other if user == 33 else listener).close()
os.setuid(user)
def answer(sock):
    while data := sock.recv(4096):
        print(json.dumps({{"event": "read", "user": user, "text": data.decode()}}), flush=True)
        sock.sendall(data)
    sock.close()
while True:
    sock, _peer = (listener if user == 33 else other).accept()
    print(json.dumps({{"event": "accepted", "user": user}}), flush=True)
    threading.Thread(target=answer, args=(sock,), daemon=True).start()
"""
SECRET = "the secret of user 33"


def test_who_really_accepts_is_asked_about_before_anything_is_said_to_it(tmp_path: Path) -> None:
    prologue = tmp_path / "prologue"
    prologue.write_text(SECRET)
    programs = {"origin": server("threads", "0.0.0.0"), "destination": [sys.executable, "-c", TWO_USERS]}
    with world(programs=programs, captured=False) as here, Door(here, changed(users=[33])) as door:
        outcomes: set[str] = set()

        def pass_one() -> bool:
            here.owner = here.lab.origin
            with here.lab.peer.enter(), socket.create_connection((str(here.lab.origin.ipv4), PORT)) as peer:
                here.knows_peer(peer.getsockname()[1])
                exchange(peer, b"before")
                report = try_to_pass(here, "--prologue", str(prologue), *SEEN)
                told = door.audited()
                if report["exit"] == 0:
                    assert (told["verdict"], told["user"]) == ("accepted", "33")
                    assert door.audited()["verdict"] == "active"
                else:
                    assert (report["exit"], report["owner"], report["error"]) == (3, "origin", REFUSED)
                    assert told["reason"] == "rule sessions does not allow the user 34 of the program"
                exchange(peer, b"after")
                outcomes.add(told["verdict"])
            return outcomes == {"accepted", "denied"}
        until(pass_one, "both to have been chosen", timeout_s=200)
        events = here.nodes["destination"].events
        assert {one["user"] for one in events if one["event"] == "accepted"} == {33, 34}
        assert {one["user"] for one in events if one["event"] == "read"} == {33}
        assert SECRET in {one["text"] for one in events if one["event"] == "read"}


def test_a_program_that_is_another_by_the_commit_does_not_get_it(tmp_path: Path) -> None:
    python = tmp_path / "python"
    shutil.copy(PYTHON, python)
    replaced = tmp_path / "replaced"
    replaced.write_bytes(b"#!/bin/sh\n")
    with conversation(register=False) as (here, peer), \
            Door(here, changed(executables=[str(python)])) as door:
        path = ":".join(one for one in sys.path if one)
        here.nodes["destination"].end()
        program = here.lab.destination.spawn([python, "-m", "criu_tcpcp.lab.node", "--port", str(PORT)],
                                             env={"PYTHONPATH": path})
        until(lambda: list((here.lab.destination.run_dir / "apps").glob(f"*.{program.pid}.sock")), "the receiver")
        exchange(peer, b"before")
        attempt = Attempt(here, "origin:send commit")
        replaced.rename(python)  # as an upgrade does: the file of the policy is not what runs there any more
        attempt.go_on()
        report = attempt.outcome()
        assert report is not None
        assert (report["owner"], report["exit"]) == ("origin", 1), report
        assert DENIED in str(report["error"])
        assert [door.audited()["verdict"], door.audited()["verdict"]] == ["accepted", "undone"]
        exchange(peer, b"after")
        finish(here, peer, passes=0)
