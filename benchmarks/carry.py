"""What the SSH channel leaves of the throughput of plain IP forwarding.

    ./dev bench carry [--pairs 5] [--seconds 2] [--version 4] [--json]

In turn, two streams from the peer through the origin host to the destination:

    plain    to an address that the destination has, and that the gateway's and the origin's routes lead to it
    carry    to the origin's own address: a connection that was passed, whose packets travel through SSH both ways

As fast as the machine can, in packets as large as the link allows; the peer's kernel counts the bytes that were
acknowledged. Ends with the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from socket import socket

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import forward
from world import Program, World, world


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench carry", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--version", type=int, default=4, choices=[4, 6])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    version: int = arguments.version
    with world("echo", version=version, captured=False, register=False) as here:
        here.nodes["destination"].end()  # its place is the sink's
        forward.lead_to_destination(here)
        here.lab.peer.run(["ip", "link", "set", "eth0", "gso_max_segs", "1"])
        sink = here.nodes["destination"] = Program(
            here.lab.destination, [sys.executable, "-c", forward._SINK, forward._OTHER[version]])
        sink.wait_for("ready")
        pairs = []
        for number in range(arguments.pairs):
            ways = {"plain": forward.plain, "carry": carried}
            order = list(ways) if number % 2 == 0 else list(reversed(ways))
            pairs.append({way: forward.measured(here, ways[way], arguments.seconds) for way in order})
        here.release()
    ratios = [one["carry"].bytes_s / one["plain"].bytes_s for one in pairs]
    median = {way: statistics.median(one[way].bytes_s for one in pairs) / 1e6 for way in ("plain", "carry")}
    if arguments.json:
        print(json.dumps({"version": version, "throughput": statistics.median(ratios),
                          "pairs": [{way: asdict(run) for way, run in one.items()} for one in pairs]}))
    else:
        print(f"IPv{version}: plain {median['plain']:.1f} MB/s, carry {median['carry']:.1f} MB/s\n"
              f"carry / plain, median of {len(pairs)} pairs: {statistics.median(ratios):.3f} "
              f"({min(ratios):.3f} to {max(ratios):.3f})")
    return 0


@contextmanager
def carried(here: World) -> Iterator[socket]:
    here.owner = here.lab.origin
    served = here.node.count("serving")
    with forward.connect(here, str(here.lab.origin.address(here.version))) as sock:
        here.node.wait_for("serving", served + 1)
        here.pass_once("--into", "receiver", "--redirect", "carry", attempts=3)
        yield sock


if __name__ == "__main__":
    sys.exit(main())
