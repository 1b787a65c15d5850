"""A connected UDP socket is passed over real SSH, there and back, and its peer misses nothing."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest

from attempt import Attempt
from datagrams import DatagramPeer, datagram_world
from waiting import until
from world import COMMAND

pytestmark = pytest.mark.root

CLEAN: dict[str, object] = {"lost": [], "doubled": [], "overtaken": [], "changed": 0, "error": None}


@pytest.mark.parametrize(("version", "listen"), [(4, "0.0.0.0"), (4, "::"), (6, "::")], ids=["v4", "v4-mapped", "v6"])
def test_numbered_datagrams_go_on_there_and_back_none_lost_doubled_or_overtaken(version: int, listen: str) -> None:
    with datagram_world(version=version, listen=listen) as here:
        peer = DatagramPeer(here, "--rate", "500")
        for _ in range(4):
            report = here.pass_once()
            assert report["connection"].startswith("udp ")
            assert report["left"] == []
        said = peer.finish()
        assert {name: said[name] for name in CLEAN} == CLEAN, said
        assert said["answered"] == said["sent"] > 100
        assert here.judged(passes=4) == []
        here.node.end()  # the kernel ends nothing: nobody says goodbye in UDP
        assert here.release() == []


def nearly_clean(said: dict[str, Any]) -> bool:
    """Of datagrams in several packets one may be lost as the kernel begins to put them together, or ceases to
    (docs/udp.md): at each host once."""
    return len(said["lost"]) <= 2 and {name: said[name] for name in CLEAN} == {**CLEAN, "lost": said["lost"]}



@pytest.mark.parametrize("version", [4, 6])
def test_datagrams_in_several_packets_go_on_as_well(version: int) -> None:
    """Only the first packet of such a datagram names its ports."""
    with datagram_world(version=version) as here:
        peer = DatagramPeer(here, "--rate", "200", "--size", "4000")
        for _ in range(2):
            here.pass_once()
        said = peer.finish()
        assert nearly_clean(said), said
        assert said["sent"] > 100
        here.node.end()
        assert here.release() == []


@pytest.mark.parametrize("version", [4, 6])
def test_where_the_hosts_share_no_link_they_go_through_a_tunnel(version: int) -> None:
    """With datagrams of several packets, and a guard that lets nothing else out."""
    with datagram_world(version=version, apart=("destination",)) as here:
        peer = DatagramPeer(here, "--rate", "200", "--size", "3000")
        report = here.pass_once("--via", str(here.lab.destination.ipv4))
        assert "by a tunnel" in report["redirect"]
        here.pass_once("--via", str(here.lab.origin.ipv4))
        said = peer.finish()
        assert nearly_clean(said), said
        here.node.end()
        assert here.release() == []


def test_a_program_that_knows_nothing_gets_it_in_the_place_of_a_descriptor() -> None:
    spare = [sys.executable, "-m", "criu_tcpcp.lab.datagrams", "spare"]
    with datagram_world(destination_argv=spare) as here:
        peer = DatagramPeer(here, "--rate", "200")
        there = here.nodes[here.lab.destination.name]
        fd = there.wait_for("serving")["fd"]
        report = here.pass_once("--into", f"pid:{there.process.pid}:{fd}")
        assert f"process {there.process.pid}" in report["into"]
        here.pass_once()
        said = peer.finish()
        assert {name: said[name] for name in CLEAN} == CLEAN, said
        here.node.end()
        assert here.release() == []


def test_the_origins_program_learns_it_as_of_a_closed_port_and_a_registered_one_hands_its_state_over() -> None:
    with datagram_world(register=True) as here:
        peer = DatagramPeer(here, "--count", "20", "--rate", "1000")
        peer.program.wait_for("ready")
        report = here.pass_once()
        assert report["owner"] == "destination"
        assert here.nodes["origin"].wait_for("gone")["error"] is None
        assert here.node.wait_for("serving")["how"] == "passed"
        assert peer.finish()["lost"] == []
        here.node.end()
        assert here.release() == []
    with datagram_world() as here:
        peer = DatagramPeer(here, "--rate", "100")
        here.pass_once()
        assert "refused" in here.nodes["origin"].wait_for("end")["error"]
        assert peer.finish()["lost"] == []
        here.node.end()
        assert here.release() == []


def test_what_cannot_be_passed_is_refused_by_name_and_list_says_the_same() -> None:
    with datagram_world() as here:
        peer = DatagramPeer(here, "--rate", "100")
        listed = json.loads(here.listed("--json").splitlines()[0])
        assert (listed["protocol"], listed["state"], listed["passable"]) == ("udp", "ESTAB", True)
        there = here.nodes[here.other.name].process.pid
        refusals = {("--into", "listen:9000"): "accepts nothing", ("--into", f"accept:{there}"): "accepts nothing",
                    ("--origin-sees", "eof"): "no end of stream"}
        for options, words in refusals.items():
            done = here.owner.run(here.pass_argv(*options), check=False)
            assert done.returncode == 3
            assert words in json.loads(done.stdout)["error"], done.stdout
        done = here.owner.run([COMMAND, "dump", "--pid", str(here.node.process.pid), "--fd", str(here.descriptor()),
                               "-D", str(here.lab.directory / "images")], check=False)
        assert done.returncode == 3
        assert "UDP" in done.stderr
        assert peer.finish()["lost"] == []
        here.node.end()
        assert here.release() == []


def test_a_new_descriptor_goes_again_where_the_pass_is_undone() -> None:
    with datagram_world() as here:
        peer = DatagramPeer(here, "--rate", "100")
        program = here.nodes[here.other.name].process.pid
        before = sorted(os.listdir(f"/proc/{program}/fd"))
        attempt = Attempt(here, "destination:write prepared", "--into", f"pid:{program}", fails_with="EIO")
        report = attempt.outcome()
        assert report is not None
        assert report["owner"] == "origin"
        assert sorted(os.listdir(f"/proc/{program}/fd")) == before
        report = here.pass_once("--into", f"pid:{program}")
        assert f"process {program}" in report["into"]
        assert len(os.listdir(f"/proc/{program}/fd")) == len(before) + 1
        peer.finish()
        here.node.end()
        assert here.release() == []


@pytest.mark.parametrize(("step", "victims", "owner"), [
    ("origin:write offered", ("command", "keeper"), "origin"),
    ("destination:write prepared", ("serve",), "origin"),
    ("destination:unfence", ("serve",), "destination"), ("destination:activate", ("serve",), "destination"),
    ("origin:redirect", ("command", "keeper"), "destination")])
def test_whoever_is_killed_the_peer_goes_on_with_one_of_both(step: str, victims: tuple[str, ...], owner: str) -> None:
    with datagram_world() as here:
        peer = DatagramPeer(here, "--rate", "100")
        attempt = Attempt(here, step)
        attempt.kill(*victims)
        attempt.go_on()
        if owner == "destination" and "command" in victims:
            here.owner.run([COMMAND, "resolve"], check=False)
        else:
            attempt.outcome()
        if owner == "destination":
            here.owner = here.lab.destination
        until(lambda: here.serving(here.owner) and not here.serving(here.other), "one of both to have it")
        said = peer.finish()
        assert (said["doubled"], said["changed"], said["error"]) == ([], 0, None), said
        assert said["last_answered"] == said["sent"] - 1
        here.node.end()
        assert here.release() == []
