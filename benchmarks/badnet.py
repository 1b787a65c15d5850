"""Passes while the network between the peer and the servers is bad, all of them judged.

    ./dev bench badnet [--passes 1000] [--seed 1] [--skip CELLS] [--json]

Cell after cell: a loss of 0, 1 or 5 %, a round trip of 1, 20 or 100 ms, and one of three loads, over IPv4 and IPv6 in
turn. Where packets are lost, as many come twice, and as many come late, behind others. In each cell one connection is
passed there and back, again and again, each time once its new owner was heard. Every byte is checked at both ends, and
every wire assertion holds on the whole life of the connection, for what each end sent, as it was sent. Ends with a
table; exit status 1 unless it has no wrong byte and no violation. A violation's captures are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from criu_tcpcp.lab import Weather
from waiting import until
from world import PORT, Peer, World, world

LOSSES, ROUND_TRIPS_MS = (0.0, 0.01, 0.05), (1, 20, 100)
_RATE = 2.5e6  # bytes a second: what the captures can hold, and the queues of a link that is too slow
_LINES = 10  # of what was wrong


@dataclass(frozen=True)
class Load:
    """What the peer runs, and the sizes that the node must know."""

    name: str
    peer: tuple[str, ...]
    node: tuple[str, ...]


def _bulk(name: str, size: int, answer_size: int) -> Load:
    sizes = ("--size", str(size), "--answer-size", str(answer_size))
    return Load(name, ("burst-peer", *sizes, "--burst", "50", "--until-eof"), sizes)


LOADS = (Load("requests", ("rr-peer", "--rate", "200", "--until-eof"), ()), _bulk("bulk in", 8000, 8),
         _bulk("bulk out", 8, 8000))


@dataclass
class Cell:
    """One connection under one load, and what became of it. `undone`: passes that left it with its owner, and were
    tried again."""

    loss: float
    round_trip_ms: int
    load: Load
    version: int
    seed: int
    passes: int = 0
    undone: int = 0
    longest_hold_ms: float = 0.0
    sent_again: int = 0
    wrong: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.loss:4.0%} {self.round_trip_ms:4} ms  IPv{self.version} {self.load.name}"

    @property
    def weather(self) -> Weather:
        return Weather(self.seed, delay_ms=self.round_trip_ms / 2, loss=self.loss, duplicate=self.loss,
                       reorder=self.loss, late_ms=max(2.0, self.round_trip_ms / 4), rate=_RATE, queue_ms=500, spared=2)

    def run(self, passes: int) -> None:
        with world("rr", version=self.version, listen="0.0.0.0" if self.version == 4 else "::", whole=True,
                   node_options=self.load.node) as here:
            here.lab.put_relay(self.weather)
            peer = Peer(here, *self.load.peer)
            for _ in range(passes):
                self._pass_once(here)
            report = peer.finish()
            self.wrong += [str(report["error"])] if report["error"] else []
            if report.get("sha256_received") != report.get("sha256_expected"):
                self.wrong.append("the digest of what the peer received is another")
            if not report["error"]:
                said = here.node.wait_for("end")["error"]
                self.wrong += [str(said)] if said else []
            verdict = here.verdict(loss_free=False, reorders=True)
            self.sent_again = sum(verdict.counts.retransmissions.values())
            self.violations += map(str, verdict.violations)
            if self.violations:
                self._keep(here)
            self.violations += here.release()

    def _pass_once(self, here: World) -> None:
        until(lambda: spoke(here), "the owner to speak and be heard", every_s=0.02)
        report = here.pass_once("--max-stall", "5000", attempts=3)
        self.passes += 1
        self.undone += len(here.undone)
        self.longest_hold_ms = max(self.longest_hold_ms, report["stall_ms"])

    def _keep(self, here: World) -> None:
        kept = Path(tempfile.mkdtemp(prefix="tcpcp-badnet-"))
        for capture in here.lab.directory.glob("*.pcap"):
            shutil.copy(capture, kept)
        self.violations.append(f"captures: {kept}")


def spoke(here: World) -> bool:
    """The owner has sent something since it has the connection, and had something from the peer."""
    said = here.owner.run(["ss", "-tinH", "state", "established", "sport", "=", str(PORT)]).stdout
    return "bytes_acked" in said and "bytes_received" in said


def cells(seed: int) -> list[Cell]:
    return [Cell(loss, round_trip_ms, load, 6 if number % 2 else 4, seed + number)
            for number, (loss, round_trip_ms, load) in enumerate(itertools.product(LOSSES, ROUND_TRIPS_MS, LOADS))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench badnet", description=__doc__.split("\n")[0])
    parser.add_argument("--passes", type=int, default=1000, help="in all cells together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0, help="so many cells, which another run has had")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    all_cells = cells(arguments.seed)
    each = -(-arguments.passes // len(all_cells))
    del all_cells[:arguments.skip]
    if not arguments.json:
        print(f"{'loss, round trip, load':40}{'passes':>8}{'undone':>8}{'hold ms':>9}{'sent again':>12}"
              f"{'wrong bytes':>13}{'violations':>12}")
    for cell in all_cells:
        cell.run(each)
        if not arguments.json:
            print(f"{cell!s:40}{cell.passes:8}{cell.undone:8}{cell.longest_hold_ms:9.1f}{cell.sent_again:12}"
                  f"{len(cell.wrong):13}{len(cell.violations):12}", flush=True)
            for line in [*cell.wrong, *cell.violations][:_LINES]:
                print("   ", line)
    wrong, violations = sum(len(one.wrong) for one in all_cells), sum(len(one.violations) for one in all_cells)
    if arguments.json:
        print(json.dumps([asdict(cell) for cell in all_cells]))
    else:
        print(f"{sum(one.passes for one in all_cells)} passes, {sum(one.undone for one in all_cells)} more undone and "
              f"tried again; {wrong} wrong, {violations} violations")
    return int(wrong + violations > 0)


if __name__ == "__main__":
    sys.exit(main())
