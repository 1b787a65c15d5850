"""How soon a stream is as fast again as before: passes of a connection that carries all that its path takes.

    ./dev bench resume [--passes 6] [--rate 25] [--control cubic] [--json]

A link of so many MB/s, with a round trip of 1 ms and of 20 ms (lab/relay.py), and a stream in each direction. What the
peer's kernel counts (bytes received, bytes acknowledged) is looked at every 2 ms. A pass begins, for the peer, with the
longest time without any progress while the command runs; the time from there to the first of many milliseconds with
90 % of the throughput of the half second before is the time to resume. Beside it, in turn with it, the same passes with
a restore by TCP_REPAIR alone (ways/plain_restore). Exit status 1 if a median of ours is over the goal: 200 ms on the
short link, 15 round trips on the long one.
"""

from __future__ import annotations

import argparse
import bisect
import json
import shlex
import socket
import statistics
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from criu_tcpcp.lab import Weather
from criu_tcpcp.lab.answering import StreamEnd
from world import COMMAND, PORT, World, world

GOALS_MS = {1: 200.0, 20: 300.0}
SHARE = 0.9
_PLAIN = ["--remote-command", shlex.join(["env", f"PYTHONPATH={Path(__file__).parent / 'ways' / 'plain_restore'}",
                                          COMMAND])]
_ENDLESS = 1 << 40
_LOOK_EVERY_S = 0.002
_BEFORE_S, _WARM_UP_S, _AFTERWARDS_S = 0.5, 1.5, 1.2
_SLICE_MS, _SLICES = 50, range(-4, 16)
_BYTES = struct.Struct("=120x2Q")  # struct tcp_info: tcpi_bytes_acked, tcpi_bytes_received


@dataclass
class Progress:
    """How many bytes the peer's kernel had, at which times (seconds, monotonic)."""

    times: list[float] = field(default_factory=list)
    totals: list[int] = field(default_factory=list)

    def at(self, moment: float) -> float:
        """Between two looks, as much as lies between."""
        place = bisect.bisect_right(self.times, moment)
        if place in (0, len(self.times)):
            return float(self.totals[min(place, len(self.totals) - 1)])
        (before, after), (low, high) = self.times[place - 1:place + 1], self.totals[place - 1:place + 1]
        return low + (high - low) * (moment - before) / (after - before)

    def rate(self, begin: float, end: float) -> float:
        """Bytes a second."""
        return (self.at(end) - self.at(begin)) / (end - begin)

    def longest_pause(self, begin: float, end: float) -> tuple[float, float]:
        """(when nothing came any more, when something came again)."""
        longest = since = begin
        until = begin
        last = self.at(begin)
        for place in range(bisect.bisect_left(self.times, begin), bisect.bisect_right(self.times, end)):
            if self.totals[place] > last:
                if self.times[place] - since > until - longest:
                    longest, until = since, self.times[place]
                last, since = self.totals[place], self.times[place]
        return longest, until


class Peer:
    """One end of the stream, in this process, at the lab's peer; what it counts is looked at meanwhile."""

    def __init__(self, here: World, out: bool, control: str) -> None:
        self.progress = Progress()
        self._out = out
        self._stopped = threading.Event()
        self.wrong = False
        with here.lab.peer.enter():
            self._sock = socket.create_connection((str(here.lab.origin.ipv4), PORT), timeout=20)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control.encode())
        self._sock.settimeout(None)
        here.knows_peer(self._sock.getsockname()[1])
        self._end = StreamEnd(1, 0, 2, _ENDLESS, close=False) if out else StreamEnd(1, _ENDLESS, 2, 0, close=False)
        self._threads = [threading.Thread(target=target) for target in (self._run, self._look)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set() and not self._end.wrong:
            self._end.wait(self._sock, 0.1)
            self._end.step(self._sock)
        self.wrong = self._end.wrong

    def _look(self) -> None:
        while not self._stopped.wait(_LOOK_EVERY_S):
            acked, received = _BYTES.unpack_from(self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192))
            self.progress.times.append(time.monotonic())
            self.progress.totals.append(received if self._out else acked)

    def close(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._sock.close()
        if self.wrong:
            raise SystemExit("resume: the peer received a wrong byte")


def run(way: str, out: bool, round_trip_ms: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What each pass of one connection did to the stream."""
    amounts = ("--control", arguments.control, "--stay-open", "--send", str(_ENDLESS if out else 0),
               "--receive", str(0 if out else _ENDLESS))
    found = []
    with world("stream", node_options=amounts, captured=False) as here:
        here.lab.put_relay(Weather(delay_ms=round_trip_ms / 2, rate=arguments.rate * 1e6,
                                   queue_ms=max(5, round_trip_ms)), offload=True)
        peer = Peer(here, out, arguments.control)
        try:
            pause(_WARM_UP_S)
            for _ in range(arguments.passes):
                options = {"plain": [*_PLAIN, "--congestion", "restart"], "keep": [],
                           "restart": ["--congestion", "restart"]}[way]
                begin = time.monotonic()
                report = here.pass_once("--max-stall", "5000", *options, attempts=3)
                end = time.monotonic()
                pause(_AFTERWARDS_S)
                if arguments.verbose:
                    print([(one["name"], round(one["ms"])) for one in report["steps"] if one["ms"] >= 3], flush=True)
                found.append({"held_ms": report["stall_ms"],
                              **judge(peer.progress, begin, end, max(0.04, 2e-3 * round_trip_ms))})
        finally:
            peer.close()
    return found


def judge(progress: Progress, begin: float, end: float, window_s: float) -> dict[str, Any]:
    """What the pass between `begin` and `end` did to the stream."""
    stopped, went_on = progress.longest_pause(begin, end + 0.2)
    before = progress.rate(stopped - _BEFORE_S, stopped)
    last = progress.times[-1] - window_s
    regained = next((moment for moment in progress.times if moment >= stopped
                     and progress.rate(moment, moment + window_s) >= SHARE * before), last)
    slices = [progress.rate(stopped + number * _SLICE_MS / 1e3, stopped + (number + 1) * _SLICE_MS / 1e3)
              for number in _SLICES]
    return {"before": before, "pause_ms": (went_on - stopped) * 1e3, "resumed_ms": (regained - stopped) * 1e3,
            "slices": [one / before if before else 0 for one in slices]}


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench resume", description=__doc__.split("\n")[0])
    parser.add_argument("--passes", type=int, default=6, help="of each way, direction and link")
    parser.add_argument("--rate", type=float, default=25, help="MB/s of the link")
    parser.add_argument("--control", default="cubic", help="the congestion control of all three hosts")
    parser.add_argument("--ways", nargs="+", default=["keep", "restart", "plain"],
                        choices=["keep", "restart", "plain"])
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    if not arguments.json:
        print(f"{arguments.rate:g} MB/s, {arguments.control}, {arguments.passes} passes each; ms\n"
              f"{'round trip, stream, way':30}{'MB/s':>7}{'held':>8}{'pause':>8}{'90 % again':>12}{'worst':>8}"
              f"   % of before, by {_SLICE_MS} ms, from {_SLICES[0] * _SLICE_MS} ms")
    for round_trip_ms in GOALS_MS:
        for out in (True, False):
            for way in arguments.ways:
                passes = run(way, out, round_trip_ms, arguments)
                row = {"way": way, "round_trip_ms": round_trip_ms, "stream": "to the peer" if out else "from the peer",
                       "before_mb_s": statistics.median(one["before"] for one in passes) / 1e6,
                       "held_ms": statistics.median(one["held_ms"] for one in passes),
                       "pause_ms": statistics.median(one["pause_ms"] for one in passes),
                       "resumed_ms": statistics.median(one["resumed_ms"] for one in passes),
                       "worst_ms": max(one["resumed_ms"] for one in passes),
                       "slices": [statistics.median(one["slices"][place] for one in passes)
                                  for place in range(len(_SLICES))]}
                rows.append(row)
                if not arguments.json:
                    print(f"{round_trip_ms:3} ms, {row['stream']}, {way:10}".ljust(30)
                          + f"{row['before_mb_s']:7.1f}{row['held_ms']:8.1f}{row['pause_ms']:8.1f}"
                            f"{row['resumed_ms']:12.1f}{row['worst_ms']:8.1f}   "
                          + " ".join(f"{one * 100:.0f}" for one in row["slices"]), flush=True)
    if arguments.json:
        print(json.dumps(rows))
    return int(any(row["way"] == "keep" and row["resumed_ms"] > GOALS_MS[row["round_trip_ms"]] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
