"""Hosts whose firewall lets by what it has seen begin: at a new owner's, no connection that was passed has."""

from __future__ import annotations

import json
import socket

import pytest

from attempt import Attempt, conversation, exchange
from criu_tcpcp.core.endpoint import Flow
from criu_tcpcp.kernel import conntrack
from criu_tcpcp.lab.host import Host
from datagrams import DatagramPeer, datagram_world
from firewall import firewall
from grafting import SEEN, accepted, finish, served, server
from waiting import until
from world import COMMAND, PORT, Peer, world

pytestmark = pytest.mark.root


def entry(host: Host, flow: Flow | None) -> conntrack.Entry | None:
    assert flow is not None
    with host.enter():
        return conntrack.entry_of(flow)


def entries(host: Host, port: int = PORT) -> str:
    """All that conntrack knows there of our port, whatever the peer's."""
    known = host.run(["cat", "/proc/thread-self/net/nf_conntrack"]).stdout
    return "\n".join(line for line in known.splitlines() if f"port={port} " in line)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("loose", [0, 1])
@pytest.mark.parametrize("traffic", ["requests", "bursts"])
def test_there_and_back_under_load(traffic: str, loose: int, version: int) -> None:
    """All three hosts have one: the gateway, too, sees what it has to. What waits in a pass, and what is sent on later,
    goes out of a host whose output is as strict as its input."""
    load = {"requests": ("rr-peer", "--rate", "100"),
            "bursts": ("burst-peer", "--size", "1000", "--burst", "10", "--pause", "0.1")}[traffic]
    with world("rr", version=version, whole=True,
               node_options=("--size", "1000") if traffic == "bursts" else ()) as here:
        firewall(here, here.lab.gateway, loose=loose)
        firewall(here, here.lab.origin, loose=loose, serves=True)
        firewall(here, here.lab.destination, loose=loose)
        before = here.counters()
        peer = Peer(here, *load, "--until-eof")
        for _ in range(8):
            here.pass_once("--max-stall", "5000", attempts=3)
            known = entry(here.owner, here.flow)
            assert known is not None
            assert known.is_liberal
        report = peer.finish()
        assert report["error"] is None
        assert report["answers"] == report["requests"] > 0
        assert here.node.wait_for("end")["error"] is None
        here.prove(before, application=report)
        assert here.release() == []
        assert [entries(host) for host in here.places] == ["", ""]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("loose", [0, 1])
@pytest.mark.parametrize("model", ["threads", "reuseport"])
def test_into_a_server_that_accepts(model: str, loose: int, version: int) -> None:
    """What is forged for it passes the firewall, and leaves nothing in its table."""
    address = "0.0.0.0" if version == 4 else "::"
    with served(server("threads", address), server(model, address), version) as (here, peer):
        firewall(here, here.lab.destination, loose=loose)
        here.pass_once(*SEEN)
        accepted(here)
        exchange(peer, b"there")
        assert len(entries(here.lab.destination).splitlines()) == 1
        here.pass_once(*SEEN)
        exchange(peer, b"and back")
        finish(here, peer)
        assert entries(here.lab.destination) == ""


@pytest.mark.parametrize("step", ["origin:extract", "destination:restore", "destination:decide committed"])
def test_an_undone_pass_takes_its_entry_along(step: str) -> None:
    """Whether the host undoes it, or a later command what one that was killed has left."""
    with conversation() as (here, peer):
        firewall(here, here.lab.destination, loose=0)
        exchange(peer, b"before")
        attempt = Attempt(here, step)
        assert entry(here.lab.destination, here.flow) is not None
        attempt.kill("keeper" if step.startswith("origin") else "serve")
        report = attempt.outcome()
        assert report is not None
        assert report["owner"] == "origin", report
        exchange(peer, b"after")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        here.lab.destination.run([COMMAND, "release"])
        assert entries(here.lab.destination) == ""
        here.prove(passes=0, changes=False, loss_free=False)
        assert here.release() == []


@pytest.mark.parametrize("version", [4, 6])
def test_datagrams(version: int) -> None:
    """The peer speaks, however long this host has nothing to say."""
    with datagram_world(version=version) as here:
        for host in (here.lab.gateway, here.lab.origin, here.lab.destination):
            firewall(here, host, loose=0, serves=host is here.lab.origin)
        peer = DatagramPeer(here, "--rate", "100")
        for _ in range(4):
            here.pass_once()
            assert entry(here.owner, here.flow) is not None
        said = peer.finish()
        assert (said["lost"], said["error"]) == ([], None), said
        assert said["answered"] == said["sent"] > 50
        assert here.judged(passes=4) == []
        here.node.end()
        assert here.release() == []
        assert [entries(host) for host in here.places] == ["", ""]


def test_a_half_closed_connection_is_one_to_the_table_too() -> None:
    """With that state's time-out, as where it was closed; the end that comes goes through."""
    with world("stream", node_options=("--send", str(4 << 20), "--receive", "1000", "--rate", str(1 << 20))) as here:
        firewall(here, here.lab.destination, loose=0)
        peer = Peer(here, "stream-peer", "--send", "1000", "--receive", str(4 << 20))
        until(lambda: "CLOSE-WAIT" in here.listed(), "the peer's FIN to arrive")
        here.pass_once()
        assert "CLOSE_WAIT" in entries(here.lab.destination)
        report = peer.result()
        assert report["error"] is None
        assert report["bytes_received"] == 4 << 20
        assert here.node.wait_for("end")["error"] is None
        here.prove()
        assert here.release() == []


# -- NAT at the host itself --------------------------------------------------------------------------------------------

REDIRECTED = """
table inet nat {
    chain prerouting { type nat hook prerouting priority -100; tcp dport 9001 redirect to :9000; }
}
"""


@pytest.mark.parametrize("version", [4, 6])
def test_what_the_host_itself_translates_is_refused_by_name(version: int) -> None:
    with conversation(version=version, captured=False) as (here, _plain), here.lab.peer.enter():
        origin = here.lab.origin
        origin.run(["nft", "-f", "-"], input=REDIRECTED)
        here.clean[origin.name] += here.left_at(origin)
        with socket.create_connection((str(origin.address(version)), PORT + 1), timeout=20) as peer:
            exchange(peer, b"before")
            here.node.wait_for("serving", 2)
            rows = [json.loads(line) for line in here.listed("--json").splitlines()]
            assert [row["refusal"] for row in rows if row["peer"]].count("nat") == 1
            done = here.owner.run(here.pass_argv(), check=False)
            report = json.loads(done.stdout)
            assert (report["exit"], report["owner"], report["refusal"]) == (3, "origin", "nat"), report
            assert f":{PORT + 1}" in report["error"]
            exchange(peer, b"after")
        assert here.left_at(origin) == here.left_at(here.lab.destination) == []
