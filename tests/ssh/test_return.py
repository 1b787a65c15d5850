"""`--return origin`: where the network takes nothing from a host but what has its own address, what the destination
says goes back through the origin host, on the link or by the tunnel that brings the peer's packets."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from attempt import Attempt, exchange
from behind import behind
from criu_tcpcp.lab import Lab
from criu_tcpcp.lab.host import Host
from grafting import server
from waiting import until
from world import PORT, World

pytestmark = pytest.mark.root

BACK = ("--return", "origin")


class Filter:
    """At the gateway: nothing comes from the destination host but what has an address of its own."""

    def __init__(self, lab: Lab, version: int) -> None:
        self._gateway = lab.gateway
        family, origin = ("ip", lab.origin.ipv4) if version == 4 else ("ip6", lab.origin.ipv6)
        mac = json.loads(lab.destination.run(["ip", "-j", "link", "show", "eth0"]).stdout)[0]["address"]
        lab.gateway.run(["nft", f"table {family} strict {{ counter foreign {{ }}; chain strict {{ type filter hook "
                                f'forward priority 0; oifname "to-peer" ether saddr {mac} {family} saddr {origin} '
                                "counter name foreign drop; }; }"])

    def dropped(self) -> int:
        listed = json.loads(self._gateway.run(["nft", "-j", "list", "counters"]).stdout)
        return int(next(one["counter"]["packets"] for one in listed["nftables"] if "counter" in one))


@contextmanager
def filtered(version: int, *, apart: bool) -> Iterator[tuple[World, Filter, socket.socket]]:
    with Lab(apart=["destination"] if apart else []) as lab:
        here = World(lab, "echo", register=False, version=version, everywhere=apart)
        strict = Filter(lab, version)
        with lab.peer.enter(), socket.create_connection((str(lab.origin.address(version)), PORT), timeout=20) as peer:
            here.knows_peer(peer.getsockname()[1])
            exchange(peer, b"before")
            yield here, strict, peer


def via(host: Host, version: int, *, apart: bool) -> tuple[str, str]:
    return "--via", str(host.ipv4 if apart else host.address(version))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("apart", [False, True], ids=["link", "tunnel"])
def test_there_and_back_past_a_filter(apart: bool, version: int) -> None:
    with filtered(version, apart=apart) as (here, strict, peer):
        before = here.counters()
        for number in range(22):
            report = here.pass_once(*BACK, *via(here.other, version, apart=apart), attempts=3)
            away = number % 2 == 0
            assert ("comes back by this host" in report["redirect"]) == away
            assert report["notes"] == []
            exchange(peer, b"what is larger than one segment " * 1000 if number < 4 else b"there or here")
        finish(here, peer)
        here.prove(before, loss_free=False, captures=here.as_said(here.captures()))
        assert strict.dropped() == 0
        assert here.release() == []


def test_without_it_the_filter_drops_all() -> None:
    """So the filter of the other tests is one; and passed home, the connection speaks again."""
    with filtered(4, apart=False) as (here, strict, peer):
        here.pass_once()
        peer.sendall(b"unheard")
        until(lambda: strict.dropped() > 0, "the filter to drop", every_s=0.02)
        here.pass_once()
        assert peer.recv(100) == b"unheard"
        finish(here, peer)
        assert here.release() == []


def test_what_cannot_come_back_is_found_before_anything_is_stopped() -> None:
    with filtered(4, apart=False) as (here, _strict, peer):
        here.lab.destination.run(["nft", "table ip narrow { chain narrow { type filter hook output priority 0; "
                                         f"ip saddr {here.lab.origin.ipv4} drop; }}; }}"])
        done = here.owner.run(here.pass_argv(*BACK), check=False)
        report = json.loads(done.stdout)
        assert (done.returncode, report["owner"]) == (3, "origin")
        assert "does not come back to this host" in report["error"]
        here.lab.destination.run(["nft", "delete table ip narrow"])
        exchange(peer, b"after")
        finish(here, peer)
        assert here.release() == []


@pytest.mark.parametrize("side", ["origin", "destination"])
def test_for_a_container_behind_its_host_it_is_refused(side: str) -> None:
    programs = {name: server("threads", "0.0.0.0") for name in ("origin", "destination")}
    with behind(side, nat=True, version=4, programs=programs, captured=False) as here, here.lab.peer.enter(), \
            socket.create_connection(here.seen, timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        exchange(peer, b"before")
        done = here.owner.run(here.pass_argv(*here.into(), *BACK), check=False)
        report = json.loads(done.stdout)
        assert (report["exit"], report["owner"]) == (3, "origin"), report
        assert "container" in report["error"]
        exchange(peer, b"after")


@pytest.mark.parametrize("apart", [False, True], ids=["link", "tunnel"])
@pytest.mark.parametrize("victims", [("command", "keeper"), ("serve",)], ids="-".join)
def test_a_pass_that_is_killed_before_the_offer_leaves_nothing(victims: tuple[str, ...], apart: bool) -> None:
    with filtered(4, apart=apart) as (here, _strict, peer):
        attempt = Attempt(here, "origin:extract", *BACK)
        attempt.kill(*victims)
        attempt.go_on()
        exchange(peer, b"after")
        attempt.command.communicate(timeout=60)
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        finish(here, peer)
        assert here.release() == []


@pytest.mark.parametrize("point", ["origin:write committed", "origin:redirect"])
def test_a_keeper_that_is_killed_after_the_commit_is_made_up_for(point: str) -> None:
    with filtered(4, apart=False) as (here, strict, peer):
        attempt = Attempt(here, point, *BACK)
        attempt.kill("keeper")
        attempt.go_on()
        said, _ = attempt.command.communicate(timeout=60)
        assert json.loads(said)["owner"] == "destination"
        exchange(peer, b"after")
        assert strict.dropped() == 0
        here.owner = here.lab.destination
        finish(here, peer)
        assert here.release() == []


def finish(here: World, peer: socket.socket) -> None:
    peer.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    here.node.wait_for("end")
