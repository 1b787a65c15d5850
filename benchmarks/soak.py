"""Passes for as long as you like, all of them judged.

    ./dev soak [--seconds 600] [--passes 20] [--ip 4|6]

Round after round: a fresh pair of hosts, a peer that asks 1000 times a second, `--passes` passes there and as many
back, then every wire assertion over the captures and a look for leftovers. Between the tenth part of a round and its
end, the programs that live through it must not have one descriptor more, nor 1 % more memory. Ends with one line of
figures, or at the first round that is not clean, with what was wrong; its captures are kept then.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from world import Peer, world

#: Memory that a program takes once and keeps, whatever it does: pages of its allocator.
_PAGES = 64 * 4096


@dataclass(frozen=True)
class Size:
    """Of a process: open descriptors, and bytes in memory."""

    descriptors: int
    memory: int

    @classmethod
    def of(cls, pid: int) -> Size:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return cls(len(list(Path(f"/proc/{pid}/fd").iterdir())), pages * os.sysconf("SC_PAGESIZE"))


def growth(before: dict[str, Size], after: dict[str, Size]) -> list[str]:
    """What has grown."""
    found = []
    for name, old in before.items():
        new = after[name]
        if new.descriptors > old.descriptors:
            found.append(f"{name}'s program has {new.descriptors} descriptors, and had {old.descriptors}")
        if new.memory > old.memory * 1.01 + _PAGES:
            found.append(f"{name}'s program has {new.memory >> 10} KiB, and had {old.memory >> 10}")
    return found


def one_round(passes: int, version: int) -> tuple[int, float, list[str]]:
    """(requests answered, the longest stall in ms, what was wrong)."""
    with world("rr", version=version) as here:
        before = here.counters()
        peer = Peer(here, "rr-peer", "--rate", "1000", "--until-eof")
        warm: dict[str, Size] = {}
        for number in range(2 * passes):
            here.pass_once()
            if number == passes // 5 | 1:  # at the host at which it ends
                warm = {name: Size.of(node.process.pid) for name, node in here.nodes.items()}
        wrong = growth(warm, {name: Size.of(node.process.pid) for name, node in here.nodes.items()})
        report = peer.finish()
        wrong += [str(report["error"])] if report["error"] else []
        here.node.wait_for("end")
        wrong += [str(one) for one in here.verdict(before).violations]
        if wrong:
            kept = Path(tempfile.mkdtemp(prefix="tcpcp-soak-"))
            for capture in here.lab.directory.glob("*.pcap"):
                shutil.copy(capture, kept)
            wrong.append(f"captures: {kept}")
        wrong += here.release()
        return report["answers"], report["stall_max_ns"] / 1e6, wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev soak", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--passes", type=int, default=20, help="there, and as many back, in a round")
    parser.add_argument("--ip", type=int, choices=(4, 6))
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    rounds = answers = 0
    worst = 0.0
    while time.monotonic() < end:
        version = arguments.ip or (6 if rounds % 2 else 4)
        answered, stall_ms, wrong = one_round(arguments.passes, version)
        rounds, answers, worst = rounds + 1, answers + answered, max(worst, stall_ms)
        print(f"round {rounds}, IPv{version}: {answered} answers, longest stall {stall_ms:.1f} ms", flush=True)
        if wrong:
            print("\n".join(wrong))
            return 1
    print(f"{rounds * 2 * arguments.passes} passes, {answers} answers, longest stall {worst:.1f} ms: clean")
    return 0


if __name__ == "__main__":
    sys.exit(main())
