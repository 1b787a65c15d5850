"""Programs in a container behind a host, with NAT or with a routed address: the pass is typed on the host."""

from __future__ import annotations

import json
import socket

import pytest

from attempt import Attempt, exchange
from behind import BehindWorld, behind
from criu_tcpcp.core.handoff import Action
from grafting import SEEN, server
from waiting import until
from world import COMMAND, Peer, users

pytestmark = pytest.mark.root

TIMES = 6


def servers(version: int) -> dict[str, list[str]]:
    address = "0.0.0.0" if version == 4 else "::"
    return {name: server("threads", address) for name in ("origin", "destination")}


def entries(here: BehindWorld) -> list[str]:
    """What conntrack still knows of the connection, anywhere."""
    assert here.flow is not None
    known = [line for host in here.places
             for line in host.run(["cat", "/proc/thread-self/net/nf_conntrack"]).stdout.splitlines()]
    return [line for line in known if f"port={here.flow.peer.port} " in line]


def there_and_back(here: BehindWorld) -> None:
    """Under load, again and again; and nothing is left of it."""
    before = here.counters()
    peer = Peer(here, "rr-peer", "--rate", "100", "--echoed", "--until-eof")
    for _ in range(TIMES):
        here.pass_once("--max-stall", "5000", *SEEN, *here.into(), attempts=3)
    report = peer.finish()
    assert report["error"] is None
    assert report["answers"] == report["requests"] > 0
    here.prove(before, application=report)
    assert here.release() == []
    assert entries(here) == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("nat", [True, False], ids=["nat", "routed"])
@pytest.mark.parametrize("side", ["origin", "destination"])
def test_there_and_back_under_load(side: str, nat: bool, version: int) -> None:
    with behind(side, nat=nat, version=version, whole=True, programs=servers(version)) as here:
        there_and_back(here)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("side", ["origin", "destination"])
@pytest.mark.parametrize("step", [Action.EXTRACT, Action.RESTORE, Action.DECIDE_COMMITTED])
def test_an_undone_pass_leaves_nothing_at_the_host_either(step: Action, side: str, version: int) -> None:
    with behind(side, nat=True, version=version, programs=servers(version)) as here, here.lab.peer.enter(), \
            socket.create_connection(here.seen, timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        exchange(peer, b"before")
        is_origins = step is Action.EXTRACT
        attempt = Attempt(here, f"{'origin' if is_origins else 'destination'}:{step.value}", *SEEN, *here.into())
        attempt.kill("keeper" if is_origins else "serve")
        report = attempt.outcome()
        assert report is not None
        assert report["owner"] == "origin", report
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        exchange(peer, b"after")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.prove(passes=0, changes=False, loss_free=False)
        assert here.release() == []
        assert [line for line in entries(here) if "TIME_WAIT" not in line] == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", [4, 6])
def test_from_container_to_container_and_back(version: int) -> None:
    """Each behind a NAT of its own host: the first makes the connection's name, the second has no part in it."""
    with behind("origin", "destination", nat=True, version=version, whole=True, programs=servers(version)) as here:
        there_and_back(here)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("side", ["origin", "destination"])
def test_where_the_hosts_share_no_link_it_is_they_that_make_the_tunnel(side: str, version: int) -> None:
    with behind(side, nat=True, version=version, apart=["destination"], programs=servers(version)) as here, \
            here.lab.peer.enter(), socket.create_connection(here.seen, timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        exchange(peer, b"before")
        for text in (b"there", b"and back", b"there again"):
            report = here.pass_once(*SEEN, *here.into(), "--via", str(here.other.ipv4))
            if here.owner is here.lab.destination:
                assert "by a tunnel" in report["redirect"], report
            exchange(peer, text * 5000)
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.prove(loss_free=False)
        assert here.release() == []
        assert entries(here) == []


@pytest.mark.parametrize("side", ["origin", "destination"])
def test_a_keeper_that_is_killed_behind_the_commit_leaves_what_resolve_needs(side: str) -> None:
    with behind(side, nat=True, version=4, programs=servers(4)) as here, here.lab.peer.enter(), \
            socket.create_connection(here.seen, timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        exchange(peer, b"before")
        attempt = Attempt(here, "origin:redirect", *SEEN, *here.into())
        attempt.kill("command", "keeper")
        settled = json.loads(here.lab.origin.run([COMMAND, "resolve", "--json"], check=False).stdout)
        assert settled["owner"] == "destination", settled
        exchange(peer, b"after")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.prove(passes=1, loss_free=False, changes=False)
        assert here.release() == []
        assert entries(here) == []


@pytest.mark.parametrize("step", [Action.UNFENCE, Action.ACTIVATE])
@pytest.mark.parametrize("side", ["origin", "destination"])
def test_a_serve_that_is_killed_behind_the_commit_leaves_the_connection_there(side: str, step: Action) -> None:
    """Whoever settles it knows of the way into the container."""
    with behind(side, nat=True, version=4, programs=servers(4)) as here, here.lab.peer.enter(), \
            socket.create_connection(here.seen, timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        exchange(peer, b"before")
        if side == "origin":  # it is the way home that leads in
            here.pass_once(*SEEN, *here.into())
            exchange(peer, b"there")
        attempt = Attempt(here, f"destination:{step.value}", *SEEN, *here.into())
        attempt.kill("serve")
        report = attempt.outcome()
        assert report is not None
        assert report["owner"] == "destination", report
        exchange(peer, b"after")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.prove(passes=1 + (side == "origin"), loss_free=False, changes=False)
        assert here.release() == []
        assert entries(here) == []


@pytest.mark.parametrize("side", ["origin", "destination"])
def test_what_would_be_done_is_said_and_leaves_nothing(side: str) -> None:
    with behind(side, nat=True, version=4, programs=servers(4), captured=False) as here, \
            here.lab.peer.enter(), socket.create_connection(here.seen, timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        exchange(peer, b"before")
        before = entries(here)
        done = here.owner.run([*here.pass_argv(*here.into()), "--dry-run"])
        assert json.loads(done.stdout)["redirect"].startswith("forward"), done
        until(lambda: [host for host in here.places if here.left_at(host)] == [], "the other end to undo it",
              every_s=0.1)
        assert {line.split(" src=")[1] for line in entries(here)} == {line.split(" src=")[1] for line in before}
        exchange(peer, b"after")


def test_a_peer_behind_a_proxy_of_the_host_is_refused() -> None:
    """As of engines that have a program hand the bytes on: the connection ends at the host."""
    with behind("origin", nat=True, version=4, programs=servers(4)) as here, here.lab.origin.enter(), \
            socket.create_connection(("172.30.0.2", 9000), timeout=20) as proxy:
        exchange(proxy, b"before")
        argv = ["ss", "-tnpH", "state", "established", "dport", "=", str(proxy.getsockname()[1])]
        until(lambda: here.homes["origin"].run(argv).stdout, "the connection to be accepted")
        [(pid, fd), *_] = users(here.homes["origin"].run(argv).stdout)
        done = here.lab.origin.run([COMMAND, "pass", "--json", "--pid", str(pid), "--fd", str(fd),
                                    *here.lab.ssh_options(here.lab.destination)], check=False)
        report = json.loads(done.stdout)
        assert (report["exit"], report["owner"], report["refusal"]) == (3, "origin", "local-peer"), report
        exchange(proxy, b"after")


def test_a_host_that_takes_no_foreign_addresses_from_its_container_is_refused() -> None:
    """Nothing was stopped."""
    with behind("destination", nat=True, version=4, programs=servers(4), captured=False) as here, \
            here.lab.peer.enter(), socket.create_connection(here.seen, timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        exchange(peer, b"before")
        for name in ("all", "cbr0"):
            here.lab.destination.run(["sh", "-c", f"echo 1 >/proc/sys/net/ipv4/conf/{name}/rp_filter"])
        done = here.owner.run(here.pass_argv(*here.into()), check=False)
        report = json.loads(done.stdout)
        assert (report["exit"], report["owner"]) == (3, "origin"), report
        assert "rp_filter" in report["error"]
        exchange(peer, b"after")
