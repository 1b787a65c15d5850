"""Servers in a container with a network of its own: the pass is typed on the host, and its rules stand in there."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from attempt import Attempt, exchange, state
from criu_tcpcp.core.handoff import Action
from criu_tcpcp.kernel import netns
from criu_tcpcp.lab import Lab
from criu_tcpcp.lab.leftovers import leftovers
from grafting import CONTAINER, MODELS, SEEN, accepted, finish, server
from waiting import until
from world import COMMAND, PORT, World

pytestmark = pytest.mark.root

OFTEN = {("threads", 4), ("epoll-et", 6), ("prefork", 4)}


@contextmanager
def contained(model: str, version: int = 4) -> Iterator[tuple[World, socket.socket, int]]:
    """A conversation with the origin's program; and a server in a container at the destination, by its process."""
    address = "0.0.0.0" if version == 4 else "::"
    with Lab(["container"]) as lab:
        here = World(lab, version=version, container="container", programs={
            "origin": server("threads", address), "destination": server(model, "::", prefix=CONTAINER)})
        pid = listening(here)
        with lab.peer.enter(), socket.create_connection((str(lab.origin.address(version)), PORT), timeout=20) as peer:
            here.knows_peer(peer.getsockname()[1])
            exchange(peer, b"before")
            yield here, peer, pid


def listening(here: World) -> int:
    """Who listens in the container, as the host sees it: the server itself is in a process namespace of its own."""
    listed = here.homes["destination"].run(["ss", "-tlnpH", "sport", "=", str(PORT)]).stdout
    return min(int(one.split(",")[0]) for one in listed.split("pid=")[1:])


@pytest.mark.parametrize(("model", "version"), [
    pytest.param(model, version, marks=() if (model, version) in OFTEN else pytest.mark.long)
    for model in MODELS for version in (4, 6)])
def test_there_and_back_through_a_network_namespace(model: str, version: int) -> None:
    with contained(model, version) as (here, peer, pid):
        home = here.homes["destination"]
        report = here.pass_once("--into", f"accept:{pid}", *SEEN)
        assert f"({home.address(version)} is on the same link)" in report["redirect"], report
        told, port = accepted(here)
        assert told.removeprefix("::ffff:") == peer.getsockname()[0]
        # Which socket of a group is chosen depends on the port: one that leads to another process is replaced.
        assert port == peer.getsockname()[1] or model == "reuseport"
        exchange(peer, b"there")
        here.pass_once(*SEEN)
        exchange(peer, b"and back")
        finish(here, peer)


def test_a_descriptor_in_a_container_and_a_pass_that_stays_there() -> None:
    """`passes` and `release` at the host look where the connection is."""
    with contained("told") as (here, peer, pid):
        home, host = here.homes["destination"], here.lab.destination
        report = here.pass_once("--into", f"pid:{pid}", *SEEN)
        [known] = map(json.loads, host.run([COMMAND, "passes", "--json"]).stdout.splitlines())
        assert "diverted" in known["rules"], known
        assert "its connection is alive here" in host.run([COMMAND, "release"], check=False).stdout
        assert "its connection is alive at" in here.lab.origin.run([COMMAND, "release"], check=False).stdout
        with home.enter(), socket.create_connection((str(home.ipv4), PORT), timeout=20) as client:
            client.sendall(f"serve {report['into'].split()[-1]}".encode())
            assert client.recv(10) == b"yes"
        exchange(peer, b"there")
        finish(here, peer)


def test_a_container_behind_a_host_that_forwards_nothing_is_refused_and_nothing_is_touched() -> None:
    """What it answers would have to be led on by the destination host."""
    with Lab() as lab:
        argv = server("threads", "0.0.0.0", prefix=["unshare", "--net"])
        here = World(lab, programs={"origin": server("threads", "0.0.0.0"), "destination": argv}, waiting=False)
        pid = here.nodes["destination"].wait_for("listening")["pid"]
        for line in (f"link add inside type veth peer name eth0 netns {pid}", "address add 10.99.0.1/24 dev inside",
                     "link set inside up"):
            lab.destination.run(["ip", *line.split()])
        for line in ("link set lo up", "address add 10.99.0.2/24 dev eth0", "link set eth0 up",
                     "route add default via 10.99.0.1"):
            lab.destination.run(["nsenter", f"--net=/proc/{pid}/ns/net", "ip", *line.split()])
        here.clean[lab.destination.name] = leftovers(lab.destination)
        with lab.peer.enter(), socket.create_connection((str(lab.origin.ipv4), PORT), timeout=20) as peer:
            here.knows_peer(peer.getsockname()[1])
            done = lab.origin.run(here.pass_argv("--into", f"accept:{pid}"), check=False)
            report = json.loads(done.stdout)
            assert (report["exit"], report["owner"]) == (3, "origin"), report
            assert "the container's host forwards nothing" in report["error"], report
            exchange(peer, b"after")
            peer.shutdown(socket.SHUT_WR)
            assert peer.recv(1) == b""
        here.prove(passes=0)
        assert here.release() == []


@pytest.mark.parametrize("step", [Action.RESTORE, Action.UNFENCE, Action.ACTIVATE])
def test_a_serve_that_is_killed_in_a_container_leaves_one_owner_and_no_rule(step: Action) -> None:
    """Whoever settles it comes from the host, and goes in."""
    with contained("threads") as (here, peer, pid):
        attempt = Attempt(here, f"destination:{step.value}", "--into", f"accept:{pid}", *SEEN)
        with netns.enter(here.homes["destination"].netns):
            assert netns.own() == netns.identity(f"/proc/{attempt.find('tcpcp-serve')[0]}/ns/net")
        attempt.kill("serve")
        report = attempt.outcome()
        assert report is not None
        assert report["owner"] == ("origin" if step is Action.RESTORE else "destination"), report
        exchange(peer, b"after")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.prove(passes=int(report["owner"] == "destination"), loss_free=False, changes=False)
        assert here.release() == []


def test_a_container_that_has_gone_took_its_rules_along() -> None:
    """Nothing of the host is taken for what was in it, and `release` forgets the pass."""
    with contained("threads") as (here, peer, pid):
        here.pass_once("--into", f"accept:{pid}", *SEEN)
        exchange(peer, b"there")
        container, hosts = here.homes["destination"], (here.lab.destination, here.lab.origin)
        container.collect_processes()
        subprocess.run(["ip", "netns", "del", container.netns.name], check=True)
        until(lambda: state(pid) in ("", "Z"), "the container's end")
        here.nodes["origin"].end()
        for host in hosts:
            assert "kept" not in host.run([COMMAND, "release"]).stdout
        assert [line for host in hosts for line in here.left_at(host)] == []
