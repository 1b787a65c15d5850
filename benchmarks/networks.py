"""Every way of leading packets on, over every network that it claims to work on: passes under load, all of them judged.

    ./dev bench networks [--connections 50] [--at-once 10] [--strategy NAME] [--network NAME] [--version 4|6]

Cell after cell, a strategy over a network: so many connections carry requests, 50 a second each, and each is passed to
the destination and home again, by the same strategy, while the others go on. Every answer is checked at the peer, and
every wire assertion on the whole life of each connection. What does not work has to be refused, with nothing touched.
Ends with a table; exit status 1 unless every cell has as many clean connections as were asked for, or as many refusals.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from criu_tcpcp.core.endpoint import Flow
from criu_tcpcp.lab import Host, Lab
from firewall import firewall
from waiting import until
from world import Peer, World

_BALANCER = Path(__file__).resolve().parents[1] / "examples" / "hooks" / "nft_balancer.py"
_ATTEMPTS = 3
_ANSWERS = 3  # of each owner, before the connection is passed on
_LINES = 5  # of what was wrong in a cell


@dataclass
class Talk:
    """One connection: the peer's program, and what passed it."""

    peer: Peer
    flow: Flow
    owners: list[tuple[int, int, Host, Host]] = field(default_factory=list)


class Crowd(World):
    """Several connections of one program; one at a time is the one under test."""

    def descriptor(self) -> int:
        return self.serving(self.owner)[0][1]

    def opens(self) -> Talk:
        served = self.node.count("serving")
        peer = Peer(self, "rr-peer", "--rate", "50", "--until-eof")
        self.node.wait_for("serving", served + 1)
        assert self.flow is not None
        return Talk(peer, self.flow)

    def takes(self, talk: Talk) -> None:
        """The connection under test is this one."""
        self.flow, self._owners = talk.flow, talk.owners
        self.owner = talk.owners[-1][3] if talk.owners else self.lab.origin

    def spoke(self) -> bool:
        """The owner was heard, some times."""
        assert self.flow is not None
        said = self.homes[self.owner.name].run(["ss", "-tinH", "sport", "=", str(self.flow.local.port), "dport", "=",
                                                str(self.flow.peer.port)]).stdout
        return any(int(word.removeprefix("data_segs_out:")) >= _ANSWERS for word in said.split()
                   if word.startswith("data_segs_out:"))


# -- networks ----------------------------------------------------------------------------------------------------------

@contextmanager
def on_link(version: int) -> Iterator[Crowd]:
    """Origin and destination on one link."""
    with Lab() as lab:
        yield Crowd(lab, "rr", version=version)


@contextmanager
def routed(version: int) -> Iterator[Crowd]:
    """A router between origin and destination."""
    with Lab(apart=["destination"]) as lab:
        yield Crowd(lab, "rr", version=version)


@contextmanager
def firewalled(version: int) -> Iterator[Crowd]:
    """Origin, destination and gateway let by what they have seen begin, and no more (nf_conntrack_tcp_loose 0)."""
    with Lab() as lab:
        here = Crowd(lab, "rr", version=version)
        for host in (lab.gateway, lab.origin, lab.destination):
            firewall(here, host, loose=0, serves=host is lab.origin)
        yield here


NETWORKS: dict[str, Callable[[int], AbstractContextManager[Crowd]]] = {
    "on-link": on_link, "routed": routed, "firewall": firewalled}


# -- strategies --------------------------------------------------------------------------------------------------------

def forward(here: Crowd) -> list[str]:
    return ["--redirect", "forward", "--via", str(here.other.address(4 if _is_apart(here) else here.version))]


def hook(here: Crowd) -> list[str]:
    """The gateway's nftables balancer leads a connection to whichever of the two has it."""
    gateway, version = here.lab.gateway, here.version
    marks = {host: (str(host.address(4 if _is_apart(here) else version)), str(number))
             for number, host in enumerate((here.lab.origin, here.lab.destination), 1)}
    family, kind = ("ip6", "ipv6_addr") if version == 6 else ("ip", "ipv4_addr")
    if "balancer" not in gateway.run(["nft", "list", "tables"]).stdout:
        gateway.run(["nft", f"table {family} balancer {{ "
                     f"map moved {{ type {kind} . inet_service . inet_service : mark; }}; "
                     f"chain steer {{ type filter hook prerouting priority mangle; "
                     f"meta mark set {family} saddr . tcp sport . tcp dport map @moved; }}; }}"])
        for host, (_via, mark) in marks.items():
            gateway.run(["ip", f"-{version}", "rule", "add", "fwmark", mark, "lookup", f"10{mark}"])
            gateway.run(["ip", f"-{version}", "route", "add", "default", "via", str(host.address(version)), "table",
                         f"10{mark}"])
    command = [sys.executable, str(_BALANCER), "--gateway", f"nsenter --net={gateway.netns}",
               *(word for via, mark in marks.values() for word in ("--mark", f"{via}={mark}"))]
    return ["--redirect", f"hook:{shlex.join(command)}", "--via", marks[here.other][0]]


def _is_apart(here: Crowd) -> bool:
    """A tunnel over IPv6 is refused where the path is not wider than the peer's."""
    return here.lab.origin.ipv4.packed[:3] != here.lab.destination.ipv4.packed[:3]


STRATEGIES: dict[str, Callable[[Crowd], list[str]]] = {"forward": forward, "hook": hook}


# -- cells -------------------------------------------------------------------------------------------------------------

@dataclass
class Cell:
    """What became of the connections."""

    strategy: str
    network: str
    version: int
    clean: int = 0
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    longest_hold_ms: float = 0.0

    def play(self, connections: int, at_once: int) -> None:
        for begin in range(0, connections, at_once):
            with NETWORKS[self.network](self.version) as here:
                self._play(here, min(at_once, connections - begin))

    def _play(self, here: Crowd, count: int) -> None:
        talks = [here.opens() for _ in range(count)]
        for talk in talks:
            here.takes(talk)
            for _ in ("there", "home"):
                until(here.spoke, "its owner to be heard")
                if not self._pass(here):
                    break
        captures = None
        for talk in talks:
            here.takes(talk)
            until(here.spoke, "its owner to be heard")
        reports = [talk.peer.finish() for talk in talks]
        captures = here.captures()
        for talk, report in zip(talks, reports, strict=True):
            here.takes(talk)
            self._judge(here, captures, report, bool(talk.owners))
        self.wrong += here.release()

    def _pass(self, here: Crowd) -> bool:
        options = STRATEGIES[self.strategy](here)
        if here.owner is here.lab.destination and self.strategy == "forward":
            options[1] = "auto"  # the address is there: none
        try:
            report = here.pass_once(*options, attempts=_ATTEMPTS)
        except AssertionError as error:
            text = error.args[0][0] if error.args and isinstance(error.args[0], tuple) else {}
            if text.get("exit") == 3:
                self.refused.append(text["error"])
            else:
                self.wrong.append(str(error)[:500])
            return False
        self.longest_hold_ms = max(self.longest_hold_ms, report["stall_ms"])
        return True

    def _judge(self, here: Crowd, captures: list[Any], report: dict[str, Any], was_passed: bool) -> None:
        if report["error"]:
            self.wrong.append(report["error"])
            return
        try:
            here.prove(loss_free=True, application=report, captures=captures)
        except AssertionError as error:
            self.wrong.append(str(error))
            return
        self.clean += was_passed

    def __str__(self) -> str:
        said = f"{self.clean} clean" if not self.refused else f"{len(self.refused)} refused: {self.refused[0]}"
        return (f"{self.strategy:10}{self.network:12}IPv{self.version}  {said}, {len(self.wrong)} wrong, "
                f"longest hold {self.longest_hold_ms:.1f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench networks", description=__doc__.split("\n")[0])
    parser.add_argument("--connections", type=int, default=50, help="of each cell")
    parser.add_argument("--at-once", type=int, default=10)
    parser.add_argument("--strategy", choices=STRATEGIES, nargs="+", default=list(STRATEGIES))
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument("--version", type=int, choices=[4, 6], nargs="+", default=[4, 6])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    played = []
    for strategy in arguments.strategy:
        for network in arguments.network:
            for version in arguments.version:
                cell = Cell(strategy, network, version)
                cell.play(arguments.connections, arguments.at_once)
                played.append(cell)
                if not arguments.json:
                    print(cell, flush=True)
                    for line in cell.wrong[:_LINES]:
                        print("   ", line, flush=True)
    if arguments.json:
        print(json.dumps([vars(cell) for cell in played]))
    return int(any(cell.wrong or arguments.connections not in (cell.clean, len(cell.refused)) for cell in played))


if __name__ == "__main__":
    sys.exit(main())
