"""How long the peer waits: passes over real SSH, seen by a peer that asks 1000 times a second.

    ./dev bench stall [--passes 100] [--ip 4|6] [--json]

One connection goes to the other host and back, again and again. For each pass, the peer's longest response time
between the command's start and its end is its stall. The same command with --dry-run does everything but the freeze;
its figures, from the same run, say how much of the stall is only this machine being busy. The time that packets were
held, as the tool reports it, stands beside both.

Exit status 1 if the median is over 3 ms or the worst over 15 ms: the budget.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from world import Peer, World, world

MEDIAN_MS, WORST_MS = 3.0, 15.0


class Windows:
    """When each command ran, and what it reported."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self.reports: list[dict[str, Any]] = []

    def run(self, command: Callable[[], dict[str, Any]]) -> None:
        begun = time.time_ns()
        self.reports.append(command())
        self.spans.append((begun, time.time_ns()))

    def longest_ms(self, stalls: list[dict[str, int]]) -> list[float]:
        """For each command, the longest response that began while it ran."""
        return [max((one["ns"] for one in stalls if begun <= one["at_ns"] <= ended), default=0) / 1e6
                for begun, ended in self.spans]


def dry_run(here: World) -> dict[str, Any]:
    here.owner.run(here.pass_argv("--dry-run"))
    return {}


def measure(passes: int, version: int) -> dict[str, Any]:
    real, rehearsed = Windows(), Windows()
    with world("rr", version=version, captured=False, own_processors=True) as here:
        peer = Peer(here, "rr-peer", "--rate", "1000", "--until-eof", "--worst", "1000000")
        for _ in range(passes):
            rehearsed.run(lambda: dry_run(here))
            real.run(here.pass_once)
        report = peer.finish()
        if report["error"] is not None:
            raise SystemExit(f"stall: the peer saw: {report['error']}")
        here.release()
    steps: dict[str, list[float]] = {}
    for one in real.reports:
        for step in one["steps"]:
            steps.setdefault(f"{step['side']} {step['name']}", []).append(step["ms"])
    return {"passes": passes, "ip": version, "requests": report["requests"],
            "usual_ms": report["stall_p50_ns"] / 1e6,
            "stall": _summary(real.longest_ms(report["stalls"])),
            "dry_run": _summary(rehearsed.longest_ms(report["stalls"])),
            "held": _summary([one["stall_ms"] for one in real.reports]),
            "steps": {name: _summary(times) for name, times in steps.items()}}


def _summary(values_ms: list[float]) -> dict[str, float]:
    ordered = sorted(values_ms)
    return {"median_ms": round(statistics.median(ordered), 3), "p90_ms": round(ordered[len(ordered) * 9 // 10], 3),
            "worst_ms": round(ordered[-1], 3)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench stall", description=__doc__.split("\n")[0])
    parser.add_argument("--passes", type=int, default=100)
    parser.add_argument("--ip", type=int, choices=(4, 6), default=4)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.passes, arguments.ip)
    stall = result["stall"]
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{result['passes']} passes over SSH, IPv{result['ip']}; "
              f"a usual response takes {result['usual_ms']:.3f} ms")
        print(f"{'':32}{'median':>9}{'p90':>9}{'worst':>9}  ms")
        rows = [("peer's stall, pass", stall), ("peer's stall, --dry-run", result["dry_run"]),
                ("packets held", result["held"]), *result["steps"].items()]
        for name, one in rows:
            print(f"{name:32}{one['median_ms']:9.3f}{one['p90_ms']:9.3f}{one['worst_ms']:9.3f}")
    return int(stall["median_ms"] > MEDIAN_MS or stall["worst_ms"] > WORST_MS)


if __name__ == "__main__":
    sys.exit(main())
