"""Hosts that can only SSH to each other: the packets of a passed connection travel through the SSH channel, both ways,
for as long as it lives."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attempt import Attempt, exchange
from criu_tcpcp import verify
from criu_tcpcp.lab import Lab
from criu_tcpcp.lab.host import Host
from criu_tcpcp.lab.streams import Stream
from criu_tcpcp.verify.wire import identity
from waiting import until
from world import COMMAND, PORT, TIMER_MS, Peer, World

pytestmark = pytest.mark.root

SOME = b"sent while nobody carries" * 400
STREAM_BYTES = 16 << 20
LARGE = b"as large as they come " * 10_000
#: At the gateway: nothing but SSH comes to the destination, or from there.
_ONLY_SSH = """table inet only_ssh {{ chain forward {{ type filter hook forward priority 0;
    tcp dport 22 accept; tcp sport 22 accept;
    {family} saddr {place} drop; {family} daddr {place} drop; }}; }}"""


def only_ssh(lab: Lab) -> None:
    for family, place in (("ip", "10.77.3.0/24"), ("ip6", "fd00:77:3::/64")):
        lab.gateway.run(["nft", _ONLY_SSH.format(family=family, place=place)])


class Carried(World):
    """What leaves the origin host in the destination's name was seen at the destination's device, too."""

    def _captures_on(self) -> None:
        super()._captures_on()
        name, role, process, path = self._captures.pop()
        process.terminate()
        process.wait()
        host = self.lab.destination
        host.run(["rm", str(path)])
        anywhere = host.spawn(["tcpdump", "-i", "any", "-s", "0" if self.whole else "200", "-B", "65536", "-U",
                               "--immediate-mode", "-w", str(path), f"tcp port {PORT} or icmp or icmp6"],
                              stderr=subprocess.PIPE)
        assert anywhere.stderr is not None
        until(lambda: b"listening" in anywhere.stderr.readline(), "tcpdump to listen")  # type: ignore[union-attr]
        self._captures.append((name, role, anywhere, path))

    def captures(self) -> list[verify.Capture]:
        found = super().captures()
        assert self.flow is not None
        others = [capture for capture in found if capture.role is verify.Role.DESTINATION]
        theirs = Counter(identity(packet) for capture in others for packet in capture.packets
                         if packet.src == self.flow.local)
        self._longest_ms = self._on_the_way_ms(found)
        return [self._own(capture, theirs.copy()) if capture.role is verify.Role.ORIGIN else capture
                for capture in found]

    def _on_the_way_ms(self, captures: list[verify.Capture]) -> float:
        """How long a packet took at most, from either end to the other, through all the processes on its way."""
        seen: dict[Any, list[int]] = {}
        for capture in captures:
            for packet in capture.packets:
                seen.setdefault((packet.src, identity(packet)), []).append(packet.time_ns)
        return max(max(times) - min(times) for times in seen.values()) / 1e6

    def _was_too_slow(self, violation: verify.Violation) -> bool:
        """Where this machine has taken longer for that than any timer waits, a timer rings."""
        return super()._was_too_slow(violation) or (violation.assertion == 9 and self._longest_ms > TIMER_MS)

    def _own(self, capture: verify.Capture, theirs: Counter[Any]) -> verify.Capture:
        """Without what is the destination's."""
        assert self.flow is not None
        own = []
        for packet in capture.packets:
            if packet.src == self.flow.local and theirs[identity(packet)]:
                theirs[identity(packet)] -= 1
            else:
                own.append(packet)
        return replace(capture, packets=tuple(own))


@contextmanager
def cut_off(kind: str = "echo", version: int = 4, **options: Any) -> Iterator[Carried]:
    """A world in which the destination can be reached by SSH, and reaches nobody by anything else."""
    with Lab(apart=["destination"]) as lab:
        only_ssh(lab)
        yield Carried(lab, kind, version=version, **options)


def processes_of(here: World) -> list[Path]:
    """Of this lab: their directories in /proc."""
    networks = {os.stat(host.netns).st_ino for host in here.places}
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.stat(entry / "ns/net").st_ino in networks:
                found.append(entry)
    return found


def hurry(here: World) -> None:
    """What carries packets does not wait for what else this machine does, as on hosts of its own."""
    for entry in processes_of(here):
        with contextlib.suppress(OSError):
            if (entry / "comm").read_text().startswith(("tcpcp-", "sshd")):
                for thread in (entry / "task").iterdir():
                    os.sched_setscheduler(int(thread.name), os.SCHED_RR, os.sched_param(1))


def connected(here: World) -> socket.socket:
    with here.lab.peer.enter():
        sock = socket.create_connection((str(here.lab.origin.address(here.version)), PORT), timeout=20)
    here.knows_peer(sock.getsockname()[1])
    exchange(sock, b"before")
    return sock


def carriers(host: Host) -> list[int | None]:
    """The processes that carry packets, by `passes`: of each pass that is to be carried."""
    said = host.run([COMMAND, "passes", "--json"]).stdout
    return [one["carrier"] for one in map(json.loads, said.splitlines()) if one["carrier"] is not None]


def end(here: World, peer: socket.socket) -> None:
    peer.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    here.node.wait_for("end")


def ours(here: World, name: str) -> list[int]:
    """Processes of this lab that call themselves so."""
    return [int(entry.name) for entry in processes_of(here) if (entry / "comm").read_text().strip() == name]


@pytest.mark.parametrize("version", [4, 6])
def test_requests_there_and_back(version: int) -> None:
    with cut_off("rr", version, whole=True, own_processors=True) as here:
        before = here.counters()
        peer = Peer(here, "rr-peer", "--rate", "100", "--until-eof")
        for way in ("carry (", "none (", "carry (as asked)", "none ("):
            options = ("--redirect", "carry") if "asked" in way else ()
            report = here.pass_once("--max-stall", "5000", *options, attempts=3)
            assert report["redirect"].startswith(way)
            hurry(here)
        report = peer.finish()
        assert report["error"] is None
        assert report["answers"] == report["requests"] > 0
        here.prove(before, application=report)
        assert here.release() == []


@pytest.mark.parametrize("version", [4, 6])
def test_streams_both_ways_arrive_whole(version: int) -> None:
    """Unpaced: what is lost in queues that are full is sent again."""
    amounts = ("--send", str(STREAM_BYTES), "--receive", str(STREAM_BYTES))
    slow = ("--read-rate", str(5 << 18))
    with cut_off("stream", version, node_options=(*amounts, *slow)) as here:
        peer = Peer(here, "stream-peer", *amounts, *slow)
        until(lambda: min(here.queued()) > 50_000, "both queues of the connection to fill", every_s=0.02)
        here.pass_once("--max-stall", "5000", attempts=3)
        report = peer.result()
        assert report["error"] is None
        assert report["bytes_sent"] == report["bytes_received"] == STREAM_BYTES
        assert report["sha256_received"] == Stream(2).sha256(STREAM_BYTES)
        assert here.node.wait_for("end")["error"] is None
        here.prove(loss_free=False, changes=False)
        assert here.release() == []


def test_it_is_shown_ends_with_the_connection_and_leaves_nothing() -> None:
    with cut_off(register=False) as here, connected(here) as peer:
        assert "carry: " in here.owner.run([*here.pass_argv()[:2], *here.pass_argv()[3:], "--dry-run"]).stdout
        report = here.pass_once()
        assert carriers(here.lab.origin) == ours(here, "tcpcp-carrier")
        assert carriers(here.lab.destination) == ours(here, "tcpcp-serve")
        assert report["id"] in here.lab.origin.run([COMMAND, "passes"]).stdout
        exchange(peer, LARGE)
        end(here, peer)
        until(lambda: not ours(here, "tcpcp-carrier") + ours(here, "tcpcp-serve") + ours(here, "tcpcp-link"),
              "those that carried to end", every_s=0.1)
        assert carriers(here.lab.origin) == carriers(here.lab.destination) == []
        here.prove(loss_free=False)
        assert here.release() == []


def test_release_of_one_pass_ends_it() -> None:
    with cut_off(register=False) as here, connected(here) as peer:
        report = here.pass_once()
        assert "is alive at" in here.lab.origin.run([COMMAND, "release"], check=False).stdout
        here.lab.origin.run([COMMAND, "release", report["id"]])
        until(lambda: not ours(here, "tcpcp-carrier") + ours(here, "tcpcp-serve"), "them to end", every_s=0.1)
        peer.close()


@pytest.mark.parametrize("victim", ["carrier", "serve", "link"])
def test_one_that_is_killed_is_replaced_by_resolve(victim: str) -> None:
    """No reset, no lost byte: what is sent meanwhile is sent again."""
    with cut_off(register=False) as here, connected(here) as peer:
        before = here.counters()
        here.pass_once()
        exchange(peer, b"carried")
        for pid in ours(here, f"tcpcp-{victim}"):
            os.kill(pid, signal.SIGKILL)
        until(lambda: carriers(here.lab.origin) == carriers(here.lab.destination) == [0], "both to end", every_s=0.1)
        peer.sendall(SOME)
        assert "none" in here.lab.origin.run([COMMAND, "passes"]).stdout
        here.lab.origin.run([COMMAND, "resolve"])
        assert carriers(here.lab.origin) == ours(here, "tcpcp-carrier") != []
        got = b""
        while len(got) < len(SOME):
            got += peer.recv(1 << 16)
        assert got == SOME
        end(here, peer)
        after = here.counters()
        assert {name for name in after if "Abort" in name and after[name] != before.get(name)} == set()
        here.prove(loss_free=False)
        assert here.release() == []


def test_a_pass_that_is_undone_leaves_nothing() -> None:
    with cut_off(register=False) as here, connected(here) as peer:
        attempt = Attempt(here, "origin:extract", fails_with="EIO")
        outcome = attempt.outcome()
        assert outcome is not None
        assert outcome["owner"] == "origin"
        exchange(peer, b"after")
        end(here, peer)
        until(lambda: not ours(here, "tcpcp-serve"), "serve to end", every_s=0.1)
        assert here.release() == []
