"""Passes under the eyes of a peer that objects to everything that no honest endpoint sends (criu_tcpcp.lab.strict), and
the bugs that it must object to."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from criu_tcpcp.lab.strict.packets import without_offload
from sabotaged import BUGS, sabotaged
from waiting import until
from world import PORT, Program, World, world

pytestmark = pytest.mark.root

STREAM_BYTES = 400_000
ENDLESS = 1 << 40
RATE = 400_000


class StrictPeer:
    """`lab.strict` at the peer, at an address that the kernel there does not have."""

    def __init__(self, here: World, *argv: str) -> None:
        self.here = here
        address = here.lab.peer.address(here.version) + 100
        name, *rest = argv
        self.program = Program(here.lab.peer, [
            sys.executable, "-m", "criu_tcpcp.lab.strict", name, str(here.lab.origin.address(here.version)), str(PORT),
            "--interface", here.lab.peer.interface, "--address", str(address), *rest], stdin=subprocess.PIPE)
        here.knows_peer(int(self.program.wait_for("ready")["words"][1]), address)

    def report(self) -> dict[str, Any]:
        """What it says when it has ended."""
        until(lambda: any("program" in one for one in self.program.events), "the strict peer's report")
        report = next(one for one in self.program.events if "program" in one)
        assert self.program.process.wait() == (report["violation"] is not None)
        assert report["dropped_here"] == 0
        return report

    def finish(self) -> dict[str, Any]:
        """Ask it to end in order."""
        assert self.program.process.stdin is not None
        self.program.process.stdin.close()
        return self.report()


@contextlib.contextmanager
def strict_world(kind: str, **options: Any) -> Iterator[World]:
    """On its links there are segments as on a wire: no longer than they may be, with checksums, in order."""
    with world(kind, **options) as here:
        here.lab.keep_order()
        for host in (here.lab.origin, here.lab.destination):
            with host.enter():
                without_offload(host.interface)
        yield here


def contented(report: dict[str, Any]) -> None:
    assert report["violation"] is None, json.dumps(report["violation"], indent=1)


ALWAYS = ("bare", "wrapping")  # in every run; the others are long
#: What an honest peer may be like: options of the strict one.
VARIANTS: dict[str, tuple[str, ...]] = {
    "no-timestamps": ("--no-timestamps",), "no-sack": ("--no-sack",), "no-scale": ("--window-scale", "none"),
    "large-scale": ("--window-scale", "14"), "bare": ("--no-timestamps", "--no-sack", "--window-scale", "none"),
    "small-mss": ("--mss", "300"), "tiny-window": ("--buffer", "3000"), "slow-acks": ("--ack-delay", "0.2"),
    "wrapping": ("--iss", str(2**32 - 5000), "--tsval", str(2**32 - 1000))}


@pytest.mark.parametrize("version", [4, 6])
def test_requests_are_answered_throughout_passes_there_and_back(version: int) -> None:
    with strict_world("rr", version=version) as here:
        peer = StrictPeer(here, "rr", "--rate", "300", "--until-eof", "--lossless")
        for _ in range(2):
            here.pass_once()
        report = peer.finish()
        contented(report)
        assert report["answers"] == report["requests"] > 100
        here.node.wait_for("end")
        verdict = here.verdict(loss_free=False)  # a program may be late, and is sent to again
        assert verdict.violations == (), "\n".join(map(str, verdict.violations[:20]))
        assert here.release() == []


def streams(version: int, options: tuple[str, ...], rate: int = RATE) -> dict[str, Any]:
    """Two streams that do not end, passed there and back meanwhile; the strict peer's report."""
    amounts = ("--send", str(ENDLESS), "--receive", str(ENDLESS), "--rate", str(rate))
    with strict_world("stream", version=version, captured=False, node_options=amounts) as here:
        peer = StrictPeer(here, "stream", *amounts, "--until-eof", *options)
        for _ in range(2):
            here.pass_once("--max-stall", "5000")
        report = peer.finish()
        contented(report)
        return report


def test_streams_both_ways_and_passes_there_and_back() -> None:
    report = streams(4, ("--lossless",))
    assert min(report["bytes_sent"], report["bytes_received"]) > 50_000


def test_a_window_that_closes_and_opens_and_passes_there_and_back() -> None:
    assert streams(4, ("--buffer", "6000", "--read-rate", "100000"), rate=200_000)["zero_windows_sent"] > 0


def test_without_a_pass_there_is_nothing_to_object_to() -> None:
    """What this kernel says by itself: a whole conversation, with a reader that is slower than the writer."""
    amounts = ("--send", str(STREAM_BYTES), "--receive", str(STREAM_BYTES))
    with strict_world("stream", captured=False, node_options=amounts) as here:
        report = StrictPeer(here, "stream", *amounts, "--buffer", "20000", "--read-rate", "400000").report()
        contented(report)
        assert report["bytes_sent"] == report["bytes_received"] == STREAM_BYTES
        assert here.node.wait_for("end")["error"] is None


def test_a_strict_peer_that_has_closed_already_is_served_on_by_the_destination() -> None:
    """Half-closed: the peer's FIN has come, and much is still to be sent."""
    with strict_world("stream", captured=False,
                      node_options=("--send", str(ENDLESS), "--receive", "1000", "--rate", "100000")) as here:
        peer = StrictPeer(here, "stream", "--send", "1000", "--receive", str(ENDLESS), "--until-eof", "--lossless")
        until(lambda: "CLOSE-WAIT" in here.listed(), "the peer's FIN to arrive")
        here.pass_once()
        assert "CLOSE-WAIT" in here.listed()
        contented(peer.finish())


#: How much the program writes before it closes, and how fast the strict peer reads that.
ENDS = {"FIN-WAIT-2": (1000, None), "FIN-WAIT-1": (80_000, 10_000)}


@pytest.mark.parametrize("state", ENDS)
def test_a_strict_peer_hears_the_end_from_the_destination_at_its_place(state: str) -> None:
    """The program has closed: its end has come, or waits behind what a slow reader has no room for."""
    ours, read_rate = ENDS[state]
    slowly = ("--buffer", "6000", "--read-rate", str(read_rate)) if read_rate else ("--rate", "100000")
    with strict_world("stream", captured=False,
                      node_options=("--send", str(ours), "--receive", str(ENDLESS))) as here:
        peer = StrictPeer(here, "stream", "--send", str(ENDLESS), "--receive", str(ours), "--until-eof", *slowly)
        until(lambda: state in here.listed(), f"{state}")
        here.pass_once("--max-stall", "5000")
        until(lambda: "FIN-WAIT-2" in here.listed(), "the end to arrive", every_s=0.1)
        contented(peer.finish())


@pytest.mark.parametrize("version", [4, pytest.param(6, marks=pytest.mark.long)])
@pytest.mark.parametrize("variant", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.long)
                                     for name in VARIANTS])
def test_peers_of_every_kind(variant: str, version: int) -> None:
    streams(version, VARIANTS[variant], rate=100_000)


#: The bug, and the rule that it breaks first.
#: By the rules of which one speaks first: a byte that is missing also has the others older than what answers them.
BROKEN = {"tsval-back": {"tsval"}, "tsecr-zero": {"tsecr"}, "origin-rst": {"rst"}, "lost-byte": {"sequence", "tsecr"},
          "shrunk-window": {"right-edge"}, "origin-speaks": {"tsval", "ack", "sequence"}}


@pytest.mark.parametrize("bug", BUGS)
def test_it_objects_to_a_pass_with_a_bug(bug: str) -> None:
    with strict_world("rr", captured=False) as here:
        peer = StrictPeer(here, "rr", "--rate", "300", "--until-eof", "--lossless")
        options, environment = sabotaged(bug)
        here.pass_once(*options, env=environment)
        violation = peer.report()["violation"]
        assert violation is not None
        assert violation["rule"] in BROKEN[bug], violation
        assert violation["packet"]["number"] > 1
