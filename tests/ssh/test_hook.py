"""`--redirect hook:CMD`: a program of the operator's is told of a pass at its stages, may refuse it, never delays it,
and one that moves connections by a gateway's nftables map takes the origin host out of the packets' way."""

from __future__ import annotations

import ipaddress
import json
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from attempt import Attempt, conversation, exchange, state
from criu_tcpcp import verify
from criu_tcpcp.core.endpoint import Endpoint, Flow
from criu_tcpcp.core.errors import ExitCode, Refused
from criu_tcpcp.redirect import Plan, Setting, hook
from waiting import until
from world import COMMAND, World, captured, capturing

pytestmark = pytest.mark.root

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "hooks" / "nft_balancer.py"
#: Writes down what it is told; says no to the event named, if one is.
TELLTALE = """\
import json, pathlib, sys
log, no = pathlib.Path(sys.argv[1]), sys.argv[2:]
told = json.load(sys.stdin)
with log.open("a") as file:
    file.write(json.dumps(told) + "\\n")
if told["event"] in no:
    print("what came before", file=sys.stderr)
    sys.exit("the fabric has no room")
"""


class Telltale:
    """A hook of ours, and what it was told."""

    def __init__(self, directory: Path, *no: str) -> None:
        program = directory / "telltale.py"
        program.write_text(TELLTALE)
        self.log = directory / "told"
        self.option = ("--redirect", "hook:" + shlex.join([sys.executable, str(program), str(self.log), *no]))

    def told(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def events(self) -> list[str]:
        return [one["event"] for one in self.told()]


@contextmanager
def connected(version: int = 4) -> Iterator[tuple[World, socket.socket]]:
    """An echo, and a peer that has spoken with it."""
    with conversation(register=False, version=version) as (here, peer):
        exchange(peer, b"before")
        yield here, peer


def ended(here: World, peer: socket.socket) -> None:
    peer.close()
    here.node.wait_for("end")


def test_a_hook_is_told_of_the_pass_and_of_its_end(tmp_path: Path) -> None:
    telltale = Telltale(tmp_path)
    with connected() as (here, peer):
        report = here.pass_once(*telltale.option)
        assert report["redirect"].startswith("hook (")
        assert "bridged by forward" in report["redirect"]
        exchange(peer, b"after")
        assert telltale.events() == ["stage", "commit"]
        assert here.flow is not None
        for told in telltale.told():
            assert told == {
                "schema": 1, "event": told["event"], "id": report["id"], "flow": here.flow.to_json(),
                "origin": {"name": told["origin"]["name"]},
                "destination": {"name": told["destination"]["name"], "address": str(here.lab.destination.ipv4)}}
        ended(here, peer)
        here.prove()
        assert here.release() == []
        assert telltale.events() == ["stage", "commit", "release"]


def test_a_rehearsal_is_announced_and_withdrawn(tmp_path: Path) -> None:
    telltale = Telltale(tmp_path)
    with connected() as (here, peer):
        said = here.owner.run([*here.pass_argv(*telltale.option), "--dry-run"])
        assert json.loads(said.stdout)["redirect"].startswith("hook: ")
        assert telltale.events() == ["stage", "undo"]
        exchange(peer, b"after")
        assert here.owner is here.lab.origin


def test_a_hook_that_says_no_refuses_the_pass_with_its_own_words(tmp_path: Path) -> None:
    telltale = Telltale(tmp_path, "stage")
    with connected() as (here, peer):
        done = here.owner.run(here.pass_argv(*telltale.option), check=False)
        report = json.loads(done.stdout)
        assert done.returncode == 3
        assert "ended with status 1 on 'stage': the fabric has no room; nothing was touched" in report["error"]
        assert "Traceback" not in done.stderr
        exchange(peer, b"after")
        ended(here, peer)
        assert here.release() == []


def test_where_the_network_cannot_follow_the_connection_is_passed_and_stays_bridged(tmp_path: Path) -> None:
    telltale = Telltale(tmp_path, "commit", "release")
    with connected() as (here, peer):
        done = here.owner.run(here.pass_argv(*telltale.option), check=False)
        report = json.loads(done.stdout)
        assert (done.returncode, report["owner"]) == (ExitCode.UNCLEAN, "destination")
        assert len(report["left"]) == 1
        assert "the fabric has no room" in report["left"][0]
        assert telltale.events() == ["stage", "commit"]
        exchange(peer, b"after")
        peer.close()
        here.nodes[here.lab.destination.name].wait_for("end")
        said = here.lab.origin.run([COMMAND, "release"], check=False).stdout
        assert f"release {report['id']} --force does without it" in said
        here.lab.origin.run([COMMAND, "release", report["id"], "--force"])
        assert here.release() == []


@pytest.mark.parametrize("victims", [("keeper",), ("command", "keeper")], ids="-".join)
def test_of_a_pass_whose_processes_are_killed_the_hook_hears_too(victims: tuple[str, ...], tmp_path: Path) -> None:
    """From the command that is left, or from the next `release`."""
    telltale = Telltale(tmp_path)
    with connected() as (here, peer):
        attempt = Attempt(here, "origin:extract", *telltale.option)
        attempt.kill(*victims)
        exchange(peer, b"after")
        if "command" in victims:
            here.lab.origin.run([COMMAND, "release"])
        until(lambda: telltale.events() == ["stage", "undo"], "the hook to be told")
        ended(here, peer)
        assert here.release() == []


@pytest.mark.parametrize("version", [4, 6])
def test_a_balancers_map_takes_the_connection_away_from_the_origin_host(version: int) -> None:
    family, kind = ("ip6", "ipv6_addr") if version == 6 else ("ip", "ipv4_addr")
    with connected(version) as (here, peer):
        gateway, there = here.lab.gateway, str(here.lab.destination.address(version))
        gateway.run(["nft", f"table {family} balancer {{ "
                     f"map moved {{ type {kind} . inet_service . inet_service : mark; }}; "
                     f"chain steer {{ type filter hook prerouting priority mangle; "
                     f"meta mark set {family} saddr . tcp sport . tcp dport map @moved; }}; }}"])
        gateway.run(["ip", f"-{version}", "rule", "add", "fwmark", "2", "lookup", "102"])
        gateway.run(["ip", f"-{version}", "route", "add", "default", "via", there, "table", "102"])
        words = shlex.join([sys.executable, str(EXAMPLE), "--gateway", f"nsenter --net={gateway.netns}", "--mark",
                           f"{there}=2"])
        before = here.counters()
        assert here.flow is not None
        here.pass_once("--redirect", f"hook:{words}")
        assert str(peer.getsockname()[1]) in gateway.run(["nft", "list", "map", family, "balancer", "moved"]).stdout
        at_origin = here.lab.directory / "seen.pcap"
        capture = capturing(here.lab.origin, at_origin, 200)
        exchange(peer, b"the origin host does not see this" * 100)
        assert not [packet for packet in verify.parse(captured(capture, at_origin), "o", verify.Role.ORIGIN).packets
                    if here.flow.peer in (packet.src, packet.dst)]
        ended(here, peer)
        here.prove(before)
        assert here.release() == []
        assert "elements" not in gateway.run(["nft", "list", "map", family, "balancer", "moved"]).stdout


def test_a_balancers_map_follows_a_connection_home() -> None:
    """Its element has another mark then."""
    with connected() as (here, peer):
        gateway, lab = here.lab.gateway, here.lab
        gateway.run(["nft", "table ip balancer "
                     "{ map moved { type ipv4_addr . inet_service . inet_service : mark; }; }"])
        words = shlex.join([sys.executable, str(EXAMPLE), "--gateway", f"nsenter --net={gateway.netns}",
                           "--mark", f"{lab.destination.ipv4}=2", "--mark", f"{lab.origin.ipv4}=1"])
        for mark in (2, 1, 2):
            here.pass_once("--redirect", f"hook:{words}")
            exchange(peer, b"passed")
            assert f": 0x{mark:08x}" in gateway.run(["nft", "list", "map", "ip", "balancer", "moved"]).stdout
        ended(here, peer)
        here.prove()
        assert here.release() == []


def test_a_hook_that_is_no_program_is_refused_before_anything(tmp_path: Path) -> None:
    with connected() as (here, peer):
        for wanted, why in ((f"hook:{tmp_path}/nothing", "is not a program that can be started here"),
                          ("hook:", "nothing is not a program"), ("hook:'", "No closing quotation"),
                          ("balancer", "one of auto, none, forward, carry, address, hook:CMD")):
            done = here.owner.run([one for one in here.pass_argv("--redirect", wanted) if one != "--json"], check=False)
            assert done.returncode in (2, 3), done
            assert why in done.stderr
            assert "Traceback" not in done.stderr
        exchange(peer, b"after")


def test_a_hook_that_does_not_end_is_ended_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that it has started."""
    monkeypatch.setattr(hook, "TIMEOUT_S", 0.2)
    child = tmp_path / "child"
    words = ("sh", "-c", f"sleep 600 & echo $! > {child}; wait")
    flow = Flow(Endpoint(ipaddress.ip_address("192.0.2.1"), 1), Endpoint(ipaddress.ip_address("192.0.2.2"), 2))
    told = hook.Hook(Plan("hook", "", None, 0, "192.0.2.3", words), Setting("0" * 16, "there"))
    with pytest.raises(Refused, match=r"has not ended 0\.2 s after 'stage'"):
        told.tell("stage", flow)

    def gone() -> bool:
        pid = child.read_text().strip() if child.exists() else ""  # on a busy machine it was ended before it began
        return not pid or state(int(pid)) in ("", "Z")

    until(gone, "what it started to end")
