"""A peer that asks 1000 times a second, and what it saw of each move of its connection."""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
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


class Watched:
    """`name`: of the way in which the connection is moved. `peer`: a `PEER` program that is connected."""

    def __init__(self, name: str, lab: Lab, peer: Program) -> None:
        self.name, self._lab, self._peer = name, lab, peer
        self._spans: list[tuple[int, int]] = []      # of each move: begun, ended (wall clock, ns)
        self._steps: dict[str, list[float]] = {}
        self._sent_again = self._retransmitted()

    @classmethod
    def asking(cls, name: str, lab: Lab, *options: str) -> Watched:
        """With a new connection to the origin."""
        kind, *rest = PEER
        peer = Program(lab.peer, [*PRECEDENCE, sys.executable, "-m", "criu_tcpcp.lab.load", kind,
                                  str(lab.origin.ipv4), str(PORT), *rest, *options], stdin=subprocess.PIPE)
        peer.wait_for("ready")
        return cls(name, lab, peer)

    def move(self, action: Callable[..., dict[str, float]], *arguments: Any) -> None:
        """One move: `action` does it, and returns its steps and the time that each took, in ms."""
        pause(_PEACE_S)
        begun = time.time_ns()
        steps = action(*arguments)
        self._spans.append((begun, time.time_ns()))
        for step, took_ms in steps.items():
            self._steps.setdefault(step, []).append(took_ms)

    def result(self) -> dict[str, Any]:
        """The figures of all moves; the connection ends in order."""
        pause(_PEACE_S)
        sent_again = self._retransmitted() - self._sent_again
        report = self._report()
        stalls = [max((one["ns"] for one in report["stalls"]
                       if one["at_ns"] <= ended + _AFTERWARDS_NS and begun <= one["at_ns"] + one["ns"]), default=0)
                  / 1e6 for begun, ended in self._spans]
        return {"way": self.name, "moves": len(stalls), "requests": report["requests"],
                "usual_ms": report["stall_p50_ns"] / 1e6, "stall": summary(stalls),
                "sent_again": round(sent_again / len(stalls), 2),
                "steps": {step: summary(times) for step, times in self._steps.items()}}

    def _report(self) -> dict[str, Any]:
        """What the peer's program says at its end; an error is the end of the benchmark."""
        assert self._peer.process.stdin is not None
        self._peer.process.stdin.close()
        until(lambda: any("program" in one for one in self._peer.events), "the peer's report")
        report = next(one for one in self._peer.events if "program" in one)
        if report["error"] is not None:
            raise SystemExit(f"others: {self.name}: the peer saw: {report['error']}")
        return report

    def _retransmitted(self) -> int:
        """Segments that the peer's kernel has sent again so far."""
        return verify.parse_netstat(self._lab.peer.run(["cat", "/proc/thread-self/net/snmp"]).stdout)["TcpRetransSegs"]


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def summary(values_ms: list[float]) -> dict[str, float]:
    ordered = sorted(values_ms)
    return {"median_ms": round(statistics.median(ordered), 3), "p90_ms": round(ordered[len(ordered) * 9 // 10], 3),
            "worst_ms": round(ordered[-1], 3)}
