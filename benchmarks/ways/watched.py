"""A peer that asks 1000 times a second, and what it saw of each move of its connection."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from criu_tcpcp import verify
from criu_tcpcp.lab import Lab
from waiting import until
from world import PORT, Program

#: For what has to be as fast as on a host of its own, though all hosts share the processors.
PRECEDENCE = ["chrt", "--rr", "1"]
PEER = ["rr-peer", "--rate", "1000", "--until-eof", "--worst", "1000000"]

# What a move does to the next request or two counts as its own; then the connection has its peace until the next move.
_AFTERWARDS_NS = 10_000_000
_PEACE_S = 0.3
_SILENCE_S = 2.0


@dataclass(frozen=True)
class Seen:
    """What the peer of one connection saw."""

    stalls_ms: list[float]      # of each move
    steps_ms: dict[str, list[float]]
    requests: int
    usual_ms: float
    sent_again: int      # segments


class Watched:
    """`peer`: a `PEER` program that is connected."""

    def __init__(self, lab: Lab, peer: Program) -> None:
        self._lab, self._peer = lab, peer
        self._spans: list[tuple[int, int]] = []      # of each move: begun, ended (wall clock, ns)
        self._steps: dict[str, list[float]] = {}
        self._sent_again = self._retransmitted()

    @classmethod
    def asking(cls, lab: Lab, *options: str, address: str | None = None) -> Watched:
        """With a new connection to the origin, or to another `address`."""
        kind, *rest = PEER
        peer = Program(lab.peer, [*PRECEDENCE, sys.executable, "-m", "criu_tcpcp.lab.load", kind,
                                  address or str(lab.origin.ipv4), str(PORT), *rest, *options],
                       stdin=subprocess.PIPE)
        peer.wait_for("ready")
        return cls(lab, peer)

    def move(self, action: Callable[..., dict[str, float]], *arguments: Any) -> None:
        """One move: `action` does it, and returns its steps and the time that each took, in ms."""
        pause(_PEACE_S)
        begun = time.time_ns()
        steps = action(*arguments)
        self._spans.append((begun, time.time_ns()))
        for step, took_ms in steps.items():
            self._steps.setdefault(step, []).append(took_ms)

    def seen(self, *, orderly: bool = True) -> Seen:
        """What the peer saw of all moves; the connection ends. Where that may not work any more, or take for ever, it
        is not `orderly`: the peer's kernel aborts it (SOCK_DESTROY, which Debian's kernels have)."""
        if orderly:
            pause(_PEACE_S)
        else:
            self._lab.peer.run(["ss", "-K", "state", "established"])
        sent_again = self._retransmitted() - self._sent_again
        aborted = time.time_ns()
        report = self._report(orderly=orderly)
        waits = list(report["stalls"])
        if not orderly:      # the last request may have no answer: it has waited for one since the last answer, or less
            last = max(one["at_ns"] + one["ns"] for one in waits)
            waits.append({"at_ns": last, "ns": aborted - last})
        stalls = [max((one["ns"] for one in waits
                       if one["at_ns"] <= ended + _AFTERWARDS_NS and begun <= one["at_ns"] + one["ns"]), default=0)
                  / 1e6 for begun, ended in self._spans]
        return Seen(stalls, self._steps, report["requests"], report["stall_p50_ns"] / 1e6, sent_again)

    def goes_on(self) -> bool:
        """The peer is still answered some time after the move, as long as several time-outs of any of the two."""
        pause(_PEACE_S)
        before = self._received()
        pause(_SILENCE_S)
        return self._received() > before

    def ended(self) -> str | None:
        """What the peer's program saw that made it give up: a reset, say."""
        return next((str(one["error"]) for one in self._peer.events if "program" in one), None)

    def _received(self) -> int:
        """Bytes of answers that the peer's kernel has."""
        told = self._lab.peer.run(["ss", "-tniH", "state", "established"]).stdout
        return sum(map(int, re.findall(r"bytes_received:(\d+)", told)))

    def _report(self, *, orderly: bool) -> dict[str, Any]:
        """What the peer's program says at its end; an error of an orderly one is the end of the benchmark."""
        assert self._peer.process.stdin is not None
        self._peer.process.stdin.close()
        until(lambda: any("program" in one for one in self._peer.events), "the peer's report")
        report = next(one for one in self._peer.events if "program" in one)
        if report["error"] is not None and orderly:
            raise SystemExit(f"others: the peer saw: {report['error']}")
        return report

    def _retransmitted(self) -> int:
        """Segments that the peer's kernel has sent again so far."""
        return verify.parse_netstat(self._lab.peer.run(["cat", "/proc/thread-self/net/snmp"]).stdout)["TcpRetransSegs"]


def figures(way: str, connections: Sequence[Seen]) -> dict[str, Any]:
    """Of all moves of all connections that were moved in this way."""
    stalls = [stall for one in connections for stall in one.stalls_ms]
    steps: dict[str, list[float]] = {}
    for one in connections:
        for step, times in one.steps_ms.items():
            steps.setdefault(step, []).extend(times)
    return {"way": way, "moves": len(stalls), "requests": sum(one.requests for one in connections),
            "usual_ms": statistics.median(one.usual_ms for one in connections), "stall": summary(stalls),
            "sent_again": round(sum(one.sent_again for one in connections) / len(stalls), 2),
            "steps": {step: summary(times) for step, times in steps.items()}}


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def summary(values_ms: list[float]) -> dict[str, float]:
    ordered = sorted(values_ms)
    return {"median_ms": round(statistics.median(ordered), 3), "p90_ms": round(ordered[len(ordered) * 9 // 10], 3),
            "worst_ms": round(ordered[-1], 3)}
