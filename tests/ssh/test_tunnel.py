"""Where the two hosts share no link, the packets that are sent on take a tunnel: made when it is needed, tried before
anything is stopped, closed to everything else, and gone with the last connection that needs it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from attempt import Attempt, exchange
from criu_tcpcp.kernel.rules import tunnels
from criu_tcpcp.kernel.tunnel import Tunnel
from criu_tcpcp.lab import Lab
from criu_tcpcp.lab.host import Host
from waiting import until
from world import COMMAND, PORT, World

pytestmark = pytest.mark.root

LARGE = b"as large as they come " * 10_000


@contextmanager
def apart(version: int = 4) -> Iterator[tuple[World, socket.socket]]:
    """An echo on a host, and one on a host behind a router; the peer has spoken with the first."""
    with Lab(apart=["destination"]) as lab:
        here = World(lab, "echo", register=False, version=version)
        with lab.peer.enter(), socket.create_connection((str(lab.origin.address(version)), PORT), timeout=20) as peer:
            here.knows_peer(peer.getsockname()[1])
            exchange(peer, b"before")
            yield here, peer


def via(here: World) -> tuple[str, str]:
    return "--via", str(here.lab.destination.ipv4)


def devices(host: Host) -> list[str]:
    with host.enter():
        return tunnels()


def finish(here: World, peer: socket.socket) -> None:
    peer.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    here.node.wait_for("end")


@pytest.mark.parametrize("version", [4, 6])
def test_there_and_back_through_a_router(version: int) -> None:
    """Packets of full size, which may not be fragmented and are too long once they are wrapped; the peer hears of
    nothing. What comes home is sent on by the same tunnel."""
    with apart(version) as (here, peer):
        before = here.counters()
        report = here.pass_once(*via(here))
        assert f"by a tunnel: {here.lab.destination.ipv4} is behind the gateway" in report["redirect"]
        exchange(peer, LARGE)
        assert [len(devices(host)) for host in here.places] == [1, 1]
        report = here.pass_once("--via", str(here.lab.origin.ipv4))
        assert report["redirect"].startswith("none ")
        assert report["notes"] == []
        exchange(peer, LARGE)
        finish(here, peer)
        here.prove(before, loss_free=False)  # bytes that nothing paces: the lab loses some by itself
        assert here.release() == []
        assert [devices(host) for host in here.places] == [[], []]


def test_over_ipv6_it_is_refused_where_the_path_is_too_narrow() -> None:
    with apart(6) as (here, peer):
        done = here.owner.run(here.pass_argv("--redirect", "forward"), check=False)
        report = json.loads(done.stdout)
        assert (done.returncode, report["owner"]) == (3, "origin")
        assert "packets of 1500 bytes do not go through a tunnel over IPv6 on a path of 1500 bytes" in report["error"]
        assert "an IPv4 address of the destination (--via)" in report["hint"]
        exchange(peer, b"after")
        finish(here, peer)
        assert here.release() == []


@pytest.mark.parametrize("lost", ["all", "fragments"])
def test_a_path_that_does_not_let_it_through_is_found_before_anything_is_stopped(lost: str) -> None:
    with apart() as (here, peer):
        rule = "udp dport 4789 drop" if lost == "all" else "ip frag-off & 0x3fff != 0 drop"
        here.lab.gateway.run(["nft", f"table ip narrow {{ chain forward {{ type filter hook prerouting priority -450; "
                                     f"{rule}; }}; }}"])
        done = here.owner.run(here.pass_argv("--redirect", "forward"), check=False)
        report = json.loads(done.stdout)
        assert (done.returncode, report["owner"]) == (3, "origin")
        why = {"all": "nothing comes back from 10.77.3.12 through a tunnel",
               "fragments": "packets of 1500 bytes do not come through a tunnel to 10.77.3.12, smaller ones do"}
        assert why[lost] in report["error"]
        exchange(peer, b"after")
        finish(here, peer)
        assert here.release() == []


def test_nothing_else_comes_out_of_it() -> None:
    """Whoever has the other end could wrap what he likes, from whatever source."""
    with apart() as (here, peer):
        here.pass_once()
        tunnel = Tunnel(here.lab.origin.ipv4, here.lab.destination.ipv4)
        with here.lab.destination.enter(), socket.create_server(("0.0.0.0", 7777)) as server:
            address = str(here.lab.destination.ipv4)
            here.lab.origin.run(["ip", "route", "add", "10.9.9.9/32", "dev", tunnel.name])
            here.lab.origin.run(["ip", "neigh", "add", "10.9.9.9", "lladdr", tunnel.hardware(tunnel.there), "dev",
                                 tunnel.name])
            here.lab.destination.run(["ip", "address", "add", "10.9.9.9/32", "dev", "lo"])
            with here.lab.origin.enter(), socket.socket() as stranger:
                stranger.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    stranger.connect(("10.9.9.9", 7777))
            with here.lab.peer.enter():
                socket.create_connection((address, 7777), timeout=10).close()
            server.accept()[0].close()
        here.lab.destination.run(["ip", "address", "del", "10.9.9.9/32", "dev", "lo"])
        exchange(peer, LARGE)
        finish(here, peer)
        assert here.release() == []


def test_two_connections_share_one_and_the_last_takes_it_away() -> None:
    with apart() as (here, peer), here.lab.peer.enter(), \
            socket.create_connection((str(here.lab.origin.ipv4), PORT), timeout=20) as other:
        exchange(other, b"other")
        here.node.wait_for("serving", 2)
        second, first = (one["fd"] for one in here.nodes["origin"].events if one.get("event") == "serving")
        ids = []
        for descriptor in (first, second):
            done = here.lab.origin.run([COMMAND, "pass", "--json", "--pid", str(here.node.process.pid), "--fd",
                                        str(descriptor), *here.lab.ssh_options(here.lab.destination)])
            ids.append(json.loads(done.stdout)["id"])
        assert [len(devices(host)) for host in here.places] == [1, 1]
        other.close()
        until(lambda: here.nodes["destination"].count("end") == 1, "the first to end")
        for host in here.places:
            assert ids[0] in host.run([COMMAND, "release", ids[0]]).stdout
        assert [len(devices(host)) for host in here.places] == [1, 1]
        exchange(peer, LARGE)
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        until(lambda: here.nodes["destination"].count("end") == 2, "the second to end")
        assert here.release() == []
        assert [devices(host) for host in here.places] == [[], []]


@pytest.mark.parametrize("victims", [("keeper",), ("command", "keeper"), ("serve",)], ids="-".join)
def test_a_pass_that_is_killed_before_the_offer_leaves_no_tunnel(victims: tuple[str, ...]) -> None:
    with apart() as (here, peer):
        attempt = Attempt(here, "origin:extract")
        assert [len(devices(host)) for host in here.places] == [1, 1]
        attempt.kill(*victims)
        attempt.go_on()
        exchange(peer, b"after")
        attempt.command.communicate(timeout=60)
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        finish(here, peer)
        assert here.release() == []
        assert [devices(host) for host in here.places] == [[], []]
