"""`--redirect address`: the local address moves with its connections, and comes home with them. One host has it, or for
an instant none; the neighbours know at once; what would be lost without it is named first."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from attempt import Attempt, exchange
from criu_tcpcp import verify
from criu_tcpcp.core.endpoint import Endpoint, Flow
from criu_tcpcp.core.errors import ExitCode
from criu_tcpcp.lab import Lab, leftovers
from criu_tcpcp.lab.host import Host
from doors import Door, changed
from waiting import until
from world import COMMAND, PORT, Peer, World

pytestmark = pytest.mark.root

SERVICE = {4: "10.77.2.50", 6: "fd00:77:2::50"}
LENGTH = {4: 24, 6: 64}
MOVE = ("--redirect", "address")


class Crowd(World):
    """Several connections of one program, each with its own owners; one at a time is the one under test."""

    def descriptor(self) -> int:
        return self.serving(self.owner)[0][1]

    def spoke(self) -> bool:
        """The owner sent something, on a socket that is its own."""
        assert self.flow is not None
        said = self.owner.run(["ss", "-tinH", "sport", "=", str(self.flow.local.port), "dport", "=",
                               str(self.flow.peer.port)]).stdout
        return any(int(word.removeprefix("data_segs_out:")) >= 3 for word in said.split()
                   if word.startswith("data_segs_out:"))

    def takes(self, flow: Flow, owners: list[tuple[int, int, Host, Host]]) -> None:
        self.flow, self._owners = flow, owners
        self.owner = owners[-1][3] if owners else self.lab.origin


@contextmanager
def served(version: int = 4, kind: str = "echo", **options: Any) -> Iterator[Crowd]:
    """A server whose address is one beside the origin's own. Of IPv6, it is not chosen for what the host begins: the
    newest would be, SSH's connections too."""
    with Lab() as lab:
        kept = ["label", "eth0:vip", "metric", "77"] if version == 4 else ["preferred_lft", "0"]
        lab.origin.run(["ip", "address", "add", f"{SERVICE[version]}/{LENGTH[version]}", "dev", "eth0", *kept])
        until(lambda: not lab.origin.run(["ip", "-6", "address", "show", "tentative"]).stdout, "the address to be used")
        yield Crowd(lab, kind, version=version, listen="0.0.0.0" if version == 4 else "::", **options)


def knows(here: World) -> None:
    assert here.flow is not None
    address = ipaddress.ip_address(SERVICE[here.version])
    here.flow = replace(here.flow, local=Endpoint(address, PORT))


@contextmanager
def talking(version: int = 4, more: int = 0, **options: Any) -> Iterator[tuple[World, socket.socket, list[Other]]]:
    """An echo, and a peer that has spoken with it at that address; before it, `more` others have."""
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(served(version, register=False, **options))
        stack.enter_context(here.lab.peer.enter())
        others = []
        for number in range(1, more + 1):
            sock = stack.enter_context(socket.create_connection((SERVICE[version], PORT), timeout=20))
            exchange(sock, b"another")
            here.node.wait_for("serving", number)
            others.append(Other(sock, number))
        peer = stack.enter_context(socket.create_connection((SERVICE[version], PORT), timeout=20))
        exchange(peer, b"before")
        here.node.wait_for("serving", more + 1)
        here.knows_peer(peer.getsockname()[1])
        knows(here)
        yield here, peer, others


@dataclass(frozen=True)
class Other:
    """One more connection at the address: its peer, and which of those it is that each program serves."""

    sock: socket.socket
    number: int

    def go(self, here: World, host: Host, there: Host) -> None:
        """Pass it from the one host to the other."""
        node, served = here.nodes[host.name], here.nodes[there.name].count("serving")
        argv = [COMMAND, "pass", "--json", "--pid", str(node.process.pid), "--fd",
                str(node.wait_for("serving", self.number)["fd"]), *here.lab.ssh_options(there, here.version)]
        host.run(argv)
        here.nodes[there.name].wait_for("serving", served + 1)


def has_it(here: World) -> list[str]:
    """The hosts that have the address."""
    return [host.name for host in here.places
            if SERVICE[here.version] in host.run(["ip", "-o", "address", "show"]).stdout]


def hardware(host: Host) -> str:
    return str(json.loads(host.run(["ip", "-j", "link", "show", "dev", "eth0"]).stdout)[0]["address"])


def neighbour(here: World) -> str:
    """Where the gateway sends packets for the address."""
    said = here.lab.gateway.run(["ip", "-j", "neighbour", "show", SERVICE[here.version], "dev", "br0"]).stdout
    return str(json.loads(said)[0]["lladdr"])


def refused(here: World, *options: str) -> dict[str, Any]:
    done = here.owner.run(here.pass_argv(*MOVE, *options), check=False)
    report = json.loads(done.stdout)
    assert (done.returncode, report["owner"]) == (ExitCode.REFUSED, "origin"), (report, done.stderr)
    assert "Traceback" not in done.stderr
    return dict(report)


def finish(here: World, peer: socket.socket) -> None:
    peer.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    here.node.wait_for("end")


def no_serve(attempt: Attempt) -> None:
    """It says some more announcements before it ends."""
    until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)


@pytest.mark.parametrize("version", [4, 6])
def test_there_and_back_under_load(version: int) -> None:
    with served(version, "rr", whole=True) as here:
        hosts = leftovers(here.lab.origin), leftovers(here.lab.destination)
        before = here.counters()
        peer = Peer(here, "rr-peer", "--rate", "200", "--until-eof", address=SERVICE[version])
        knows(here)
        for _ in range(6):
            report = here.pass_once(*MOVE, "--max-stall", "5000", attempts=3)
            assert report["redirect"].startswith(f"address ({SERVICE[version]} moves there")
            assert has_it(here) == [here.owner.name]
            assert neighbour(here) == hardware(here.owner)
        report = peer.finish()
        assert report["error"] is None
        assert report["answers"] == report["requests"] > 0
        assert here.node.wait_for("end")["error"] is None
        here.prove(before, application=report)
        assert here.release() == []
        missing = [set(was) - set(leftovers(host)) for was, host in
                   zip(hosts, (here.lab.origin, here.lab.destination), strict=True)]
        assert missing == [set(), set()] or all("apps" in line for one in missing for line in one)


@pytest.mark.parametrize("version", [4, 6])
def test_all_of_its_connections_go_with_it_and_come_home(version: int) -> None:
    """Those that were forwarded before live there natively then: the host that forwarded them sees none of their
    packets any more."""
    with talking(version, more=2) as (here, peer, others):
        socks = [peer, *(other.sock for other in others)]
        for _ in range(2):
            host, there = here.owner, here.other
            for other in others:
                other.go(here, host, there)
                exchange(other.sock, b"forwarded")
            counted = forwarded(host)
            exchange(others[0].sock, b"counted")
            assert forwarded(host) > counted
            here.pass_once(*MOVE)
            assert has_it(here) == [there.name]
            counted = forwarded(host)
            for sock in socks:
                exchange(sock, b"directly" * 100)
            assert forwarded(host) == counted
            host.run(["nft", "delete", "table", "inet", "counting"])
        assert here.flow is not None
        flows = [replace(here.flow, peer=Endpoint(here.flow.peer.address, int(sock.getsockname()[1])))
                 for sock in socks]
        for sock in socks:
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
        until(lambda: here.node.count("end") == 6, "all to end, who did once before")
        captures = here.captures()
        for flow in flows:
            verdict = verify.verify(captures, flow, verify.Expectations(loss_free=True, passes=2, offload=True,
                                                                        fin_passed=True, fin_peer=True))
            assert verdict.violations == ()
            assert len(verdict.turns) == 3
        assert here.release() == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("version", "count"), [
    (4, 8), (6, 8), *(pytest.param(version, 50, marks=pytest.mark.long) for version in (4, 6))])
def test_a_crowd_under_load_moves_there_and_home(version: int, count: int) -> None:
    with served(version, "rr") as here:
        talks: list[tuple[Peer, Flow, list[tuple[int, int, Host, Host]]]] = []
        for number in range(1, count + 1):
            peer = Peer(here, "rr-peer", "--rate", "20", "--until-eof", address=SERVICE[version])
            here.node.wait_for("serving", number)
            knows(here)
            assert here.flow is not None
            talks.append((peer, here.flow, []))
        for _ in range(2):
            for number, (_peer, flow, owners) in enumerate(talks, 1):
                here.takes(flow, owners)
                until(here.spoke, "its owner to be heard", every_s=0.02)
                here.pass_once(*(MOVE if number == count else ()), "--max-stall", "5000", attempts=3)
            assert has_it(here) == [here.owner.name]
            assert neighbour(here) == hardware(here.owner)
        for _peer, flow, owners in talks:
            here.takes(flow, owners)
            until(here.spoke, "its owner to be heard", every_s=0.02)
        reports = [peer.finish() for peer, _flow, _owners in talks]
        captures = here.captures()
        for report, (_peer, flow, owners) in zip(reports, talks, strict=True):
            assert report["error"] is None
            here.takes(flow, owners)
            here.prove(application=report, captures=captures)
        assert here.release() == []


def forwarded(host: Host) -> int:
    """What came in at a host for connections at the port."""
    said = host.run(["nft", "-j", "list", "ruleset"]).stdout
    if "counting" not in said:
        host.run(["nft", f"table inet counting {{ chain came {{ type filter hook prerouting priority -400; "
                         f"tcp dport {PORT} counter; }}; }}"])
        said = host.run(["nft", "-j", "list", "ruleset"]).stdout
    rules = [one["rule"] for one in json.loads(said)["nftables"]
             if one.get("rule", {}).get("table") == "counting"]
    return int(next(part["counter"]["packets"] for part in rules[0]["expr"] if "counter" in part))


def test_what_would_stay_behind_is_named_and_the_move_refused_unless_told() -> None:
    with talking(more=1) as (here, peer, others):
        listener = here.lab.origin.spawn(["python3", "-c", LISTENS, SERVICE[4]], stdout=subprocess.PIPE, text=True)
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listening\n"
        for rehearsed in ([], ["--dry-run"]):
            done = here.owner.run(here.pass_argv(*MOVE, *rehearsed), check=False)
            said = done.stdout + done.stderr
            assert done.returncode == ExitCode.REFUSED
            assert "2 that use 10.77.2.50 would stay behind without it" in said
            assert "10.77.2.50:7777 (a listener)" in said
            assert f"10.77.2.50:9000 <-> 10.77.1.2:{others[0].sock.getsockname()[1]}" in said
            assert "or --leave-behind" in said
            assert (has_it(here), neighbour(here)) == (["origin"], hardware(here.lab.origin))
        exchange(peer, b"still here")
        here.pass_once(*MOVE, "--leave-behind")
        assert has_it(here) == ["destination"]
        exchange(peer, b"there")
        finish(here, peer)
        here.prove()
        here.lab.destination.run(["ip", "address", "del", "10.77.2.50/24", "dev", "eth0"])
        assert here.release() == []


LISTENS = """
import socket, sys
with socket.create_server((sys.argv[1], 7777)) as server:
    print("listening", flush=True)
    server.accept()
"""


def test_what_was_passed_to_another_host_would_lose_its_way() -> None:
    with Lab(["third"]) as lab:
        lab.origin.run(["ip", "address", "add", "10.77.2.50/24", "dev", "eth0"])
        here = World(lab, "echo", register=False)
        third = lab.hosts["third"]
        third.run([COMMAND, "check"], check=False)  # makes the run directory
        receiver = third.spawn([sys.executable, "-m", "criu_tcpcp.lab.node", "--port", str(PORT)],
                               stdout=subprocess.PIPE, text=True)
        assert receiver.stdout is not None
        assert "listening" in receiver.stdout.readline()
        with lab.peer.enter(), socket.create_connection(("10.77.2.50", PORT), timeout=20) as other:
            exchange(other, b"other")
            descriptor = int(here.node.wait_for("serving")["fd"])
            here.owner.run([COMMAND, "pass", "--pid", str(here.node.process.pid), "--fd", str(descriptor),
                            *lab.ssh_options(third)])
            exchange(other, b"at the third")
            with socket.create_connection(("10.77.2.50", PORT), timeout=20) as peer:
                exchange(peer, b"before")
                here.knows_peer(peer.getsockname()[1])
                here.node.wait_for("serving", 2)
                report = refused(here)
                assert "(passed to another host)" in report["error"]
                assert str(other.getsockname()[1]) in report["error"]
                exchange(peer, b"still here")
                exchange(other, b"still there")


#: What the origin's or the destination's administrator has done -> why it is refused.
UNFIT: dict[str, tuple[str, str, str]] = {
    "dynamic": ("origin", "ip address change 10.77.2.50/24 dev eth0 valid_lft 3600 preferred_lft 3600",
                "10.77.2.50 of eth0 ends by itself: DHCP"),
    "source of a route": ("origin", "ip route add 10.9.0.0/16 via 10.77.2.1 src 10.77.2.50",
                          "10.77.2.50 is the source that the route to 10.9.0.0/16 names"),
    "no link": ("destination", "ip route add 10.77.2.50/32 via 10.77.2.1", "it is behind the gateway 10.77.2.1"),
    "another link": ("destination", "ip neighbour replace 10.77.2.50 lladdr 02:00:00:00:00:01 dev eth0",
                     "there, 02:00:00:00:00:01 answers for it"),
}


@pytest.mark.parametrize("case", list(UNFIT))
def test_what_cannot_move_is_refused_before_anything_is_touched(case: str) -> None:
    where, command, why = UNFIT[case]
    with talking() as (here, peer, _others):
        argv = here.pass_argv(*MOVE)
        here.lab.hosts[where].run(command.split())
        before = leftovers(here.lab.origin), leftovers(here.lab.destination)
        done = here.owner.run(argv, check=False)
        report = json.loads(done.stdout)
        assert (done.returncode, report["owner"]) == (ExitCode.REFUSED, "origin"), report
        assert why in report["error"]
        assert "Traceback" not in done.stderr
        assert before == (leftovers(here.lab.origin), leftovers(here.lab.destination))
        exchange(peer, b"still here")


def test_the_hosts_own_address_is_refused() -> None:
    """Its others depend on it, and it is the one that SSH speaks from."""
    with Lab() as lab:
        lab.origin.run(["ip", "address", "add", "10.77.2.50/24", "dev", "eth0"])
        here = World(lab, "echo", register=False)
        with lab.peer.enter(), socket.create_connection((str(lab.origin.ipv4), PORT), timeout=20) as peer:
            here.knows_peer(peer.getsockname()[1])
            exchange(peer, b"before")
            assert "10.77.2.11 is the primary address of eth0" in refused(here, "--leave-behind")["error"]
            lab.origin.run(["ip", "address", "del", "10.77.2.50/24", "dev", "eth0"])
            assert "10.77.2.11 is the only address of eth0" in refused(here, "--leave-behind")["error"]
            lab.origin.run(["ip", "address", "add", "10.77.2.50/23", "dev", "eth0"])
            assert "from which this host speaks to the destination by SSH" in refused(here, "--leave-behind")["error"]
            exchange(peer, b"still here")


def test_where_somebody_is_logged_in_by_ssh_is_refused() -> None:
    with talking() as (here, peer, _others):
        here.lab.origin.start_sshd()
        with socket.create_connection(("10.77.2.50", 22), timeout=20) as session:
            assert session.recv(4) == b"SSH-"
            assert "10.77.2.50 is the address at which this host is reached by SSH now" in \
                refused(here, "--leave-behind")["error"]
        exchange(peer, b"still here")


def test_an_address_that_this_host_does_not_have_cannot_move_from_it() -> None:
    with talking() as (here, peer, _others):
        here.pass_once()
        assert "10.77.2.50 is an address of the destination already" in here.pass_once(*MOVE)["redirect"]
        here.pass_once()
        here.lab.origin.run(["ip", "address", "del", "10.77.2.50/24", "dev", "eth0"])
        assert "10.77.2.50 is not an address of this host" in refused(here)["error"]
        peer.close()


@pytest.mark.parametrize("victims", [("keeper",), ("command", "keeper")], ids="-".join)
@pytest.mark.parametrize("step", ["remove address", "hand over address"])
def test_who_dies_in_the_middle_leaves_it_to_another(step: str, victims: tuple[str, ...]) -> None:
    """To the command, or to `resolve`; `release` keeps its hands off until then."""
    with talking() as (here, peer, _others):
        attempt = Attempt(here, f"origin:{step}", *MOVE)
        pass_id = attempt_id(here)
        assert has_it(here) == (["origin"] if step == "remove address" else [])
        exchange(peer, b"sent on")
        attempt.kill(*victims)
        if "command" in victims:
            # A process that is killed lets go of its lock a little later.
            until(lambda: f"criu-tcpcp resolve {pass_id}" in
                  here.lab.origin.run([COMMAND, "release"], check=False).stdout, "what to do", every_s=0.02)
            done = here.lab.origin.run([COMMAND, "resolve", "--json", pass_id])
            assert json.loads(done.stdout)["owner"] == "destination"
        else:
            report = attempt.outcome()
            assert report is not None
            assert report["owner"] == "destination"
        moved(here, peer)
        no_serve(attempt)
        leave(here, peer)


def attempt_id(here: World) -> str:
    return str(json.loads(here.lab.origin.run([COMMAND, "passes", "--json"]).stdout)["id"])


def moved(here: World, peer: socket.socket) -> None:
    assert has_it(here) == ["destination"]
    assert neighbour(here) == hardware(here.lab.destination)
    exchange(peer, b"there")


def leave(here: World, peer: socket.socket) -> None:
    peer.close()
    here.nodes[here.lab.destination.name].wait_for("end")
    here.lab.destination.run(["ip", "address", "del", "10.77.2.50/24", "dev", "eth0"])
    assert here.release() == []


def goes_on(attempt: Attempt) -> bool:
    """True once it has ended. The origin asks anew, and another serve may come to the same step."""
    attempt.go_on()
    return attempt.command.poll() is not None


@pytest.mark.parametrize("step", ["add address", "announce address"])
def test_a_destination_that_dies_in_the_middle_is_asked_again(step: str) -> None:
    with talking() as (here, peer, _others):
        attempt = Attempt(here, f"destination:{step}", *MOVE)
        assert has_it(here) == (["destination"] if step == "announce address" else [])
        exchange(peer, b"sent on")
        attempt.kill("serve")
        until(lambda: goes_on(attempt), "the pass to end", every_s=0.05)
        report = attempt.outcome()
        assert report is not None
        assert (report["owner"], report["exit"]) == ("destination", 0), report
        moved(here, peer)
        no_serve(attempt)
        leave(here, peer)


def test_a_destination_that_cannot_have_it_after_all_leaves_it_where_it_was() -> None:
    """The connection stays bridged, and the report says so."""
    with talking() as (here, peer, _others):
        attempt = Attempt(here, "destination:add address", *MOVE, fails_with="ENOMEM")
        report = attempt.outcome()
        assert report is not None
        assert (report["owner"], report["exit"]) == ("destination", ExitCode.UNCLEAN)
        said = str(report["left"])
        assert "10.77.2.50 stays at this host, which sends the packets on: destination:add address" in said
        assert has_it(here) == ["origin"]
        assert neighbour(here) == hardware(here.lab.origin)
        exchange(peer, b"sent on")
        peer.close()
        here.nodes[here.lab.destination.name].wait_for("end")
        no_serve(attempt)
        assert here.release() == []


def test_what_comes_during_the_pass_keeps_the_address_where_it_is() -> None:
    with talking() as (here, peer, _others):
        attempt = Attempt(here, "origin:reroute", *MOVE)
        with socket.create_connection(("10.77.2.50", PORT), timeout=20) as late:
            exchange(late, b"late")
            attempt.go_on()
            report = attempt.outcome()
            assert report is not None
            assert (report["owner"], report["exit"]) == ("destination", ExitCode.UNCLEAN)
            assert f"10.77.1.2:{late.getsockname()[1]}" in str(report["left"])
            assert has_it(here) == ["origin"]
            exchange(late, b"alive")
            exchange(peer, b"sent on")
        peer.close()
        here.nodes[here.lab.destination.name].wait_for("end")
        assert here.release() == []


def test_a_pass_that_is_undone_moves_nothing() -> None:
    with talking() as (here, peer, _others):
        attempt = Attempt(here, "origin:verify", *MOVE, fails_with="EIO")
        report = attempt.outcome()
        assert report is not None
        assert report["owner"] == "origin"
        assert (has_it(here), neighbour(here)) == (["origin"], hardware(here.lab.origin))
        exchange(peer, b"still here")
        finish(here, peer)
        no_serve(attempt)
        assert here.release() == []


def test_where_the_destination_is_gone_resolve_finishes_it_later() -> None:
    with talking() as (here, peer, _others):
        attempt = Attempt(here, "origin:hand over address", *MOVE)
        pass_id = attempt_id(here)
        here.lab.destination.run(["nft", "table inet shut { chain out { type filter hook output priority 0; "
                                         "tcp sport 22 reject with tcp reset; }; chain in { type filter hook input "
                                         "priority 0; tcp dport 22 reject with tcp reset; }; }"])
        attempt.go_on()
        report = attempt.outcome()
        assert report is not None
        assert (report["owner"], report["exit"]) == ("destination", ExitCode.UNCLEAN)
        assert has_it(here) == []
        exchange(peer, b"sent on")
        said = here.lab.origin.run([COMMAND, "release"], check=False).stdout
        assert f"criu-tcpcp resolve {pass_id}" in said
        here.lab.destination.run(["nft", "delete", "table", "inet", "shut"])
        done = here.lab.origin.run([COMMAND, "resolve", "--json"])
        assert (json.loads(done.stdout)["owner"], json.loads(done.stdout)["exit"]) == ("destination", 0)
        moved(here, peer)
        no_serve(attempt)
        leave(here, peer)


def test_a_guarded_door_lets_no_address_in_unless_its_policy_does() -> None:
    with talking() as (here, peer, _others), Door(here, changed()) as door:
        report = refused(here)
        assert "10.77.2.50 cannot move to" in report["error"]
        assert "the policy of the destination does not allow this" in report["error"]
        assert door.audited()["verdict"] == "accepted"
        assert door.audited()["reason"] == "rule sessions does not let the address 10.77.2.50 move here (adopts)"
        exchange(peer, b"still here")
        door.allow(changed(adopts=["10.77.2.48/29"]))
        while door.audited()["verdict"] != "undone":
            pass
        here.pass_once(*MOVE)
        assert [door.audited()["verdict"] for _ in range(3)] == ["accepted", "active", "address"]
        assert has_it(here) == ["destination"]
        exchange(peer, b"there")
        leave(here, peer)


@pytest.mark.long
def test_a_destination_that_stalls_and_wakes_late_is_not_joined_by_another_host() -> None:
    """The origin gives up asking; until it has the destination's word, it does not take the address back."""
    with talking() as (here, peer, _others):
        attempt = Attempt(here, "destination:add address", *MOVE)
        report = attempt.outcome()
        assert report is not None
        assert (report["owner"], report["exit"]) == ("destination", ExitCode.UNCLEAN)
        assert has_it(here) == []
        attempt.go_on()
        until(lambda: has_it(here) == ["destination"], "the late word to count", every_s=0.05)
        done = here.lab.origin.run([COMMAND, "resolve", "--json"], env={"CRIU_TCPCP_STOP_AT": ""})
        assert json.loads(done.stdout)["exit"] == 0
        moved(here, peer)
        no_serve(attempt)
        leave(here, peer)
