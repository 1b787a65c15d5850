"""What a graft costs an unmodified server, and the peer: passes over real SSH between two of them.

    ./dev bench graft [--passes 50] [--ip 4|6] [--json]

One connection goes to the other host and back, into servers on an edge-triggered epoll that know nothing of passes.
Another client of the destination's server asks it all the time: its longest response during each pass is how long the
server stood still, and how long the machine was busy; the same during a --dry-run, which lets the server accept and
stops nothing, says how much of it is the latter. The graft's own part of the peer's stall is what `restore`, `graft`
and `activate` take longer than into a Receiver, in passes of the same run.

Exit status 1 if the server stood still for over 10 ms, or the own part of the stall is over 1 ms, at the median.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from attempt import exchange
from grafting import SEEN, server
from world import PORT, world

STOP_MS, OWN_MS = 10.0, 1.0
FIRST = ["chrt", "--rr", "1"]  # as on hosts of their own: they do not wait for the tool's processes
SERVERS = {name: server("epoll-et", "::", prefix=FIRST) for name in ("origin", "destination")}


def ask_all_the_time(address: str, port: int) -> None:
    """Another client: [when it asked, how long the answer took], in nanoseconds, for each request, when stdin ends."""
    import select
    found = []
    with socket.create_connection((address, port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], 0.0005)[0]:
            begun, start = time.time_ns(), time.monotonic_ns()
            sock.sendall(b"x")
            sock.recv(1)
            found.append((begun, time.monotonic_ns() - start))
    print(json.dumps(found), flush=True)


def in_place(passes: int, version: int) -> dict[str, Any]:
    """Passes between the servers: reports, and how long the other client waited during each, and during dry runs."""
    waits: dict[str, list[tuple[int, int]]] = {"pass": [], "dry_run": []}
    reports = []

    def timed(kind: str, command: Callable[[], Any]) -> Any:
        begun = time.time_ns()
        done = command()
        waits[kind].append((begun, time.time_ns()))
        return done

    with world(version=version, programs=SERVERS, captured=False) as here, here.lab.peer.enter(), \
            socket.create_connection((str(here.lab.origin.address(version)), PORT)) as peer:
        here.knows_peer(peer.getsockname()[1])
        other = here.lab.destination.spawn(
            [*FIRST, sys.executable, __file__, "--ask", str(here.lab.destination.address(version))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        for _ in range(passes):
            exchange(peer, b"before")
            timed("dry_run", lambda: here.owner.run(here.pass_argv("--dry-run")))
            reports.append(timed("pass", lambda: here.pass_once(*SEEN)))
            exchange(peer, b"between")
            here.pass_once(*SEEN)
        asked = json.loads(other.communicate()[0])
        here.release()
    return {"reports": reports} | {
        kind: [max((took for at, took in asked if begun <= at <= ended), default=0) / 1e6 for begun, ended in spans]
        for kind, spans in waits.items()}


def into_receivers(passes: int, version: int) -> list[dict[str, Any]]:
    with world("echo", version=version, register=False, captured=False) as here, here.lab.peer.enter(), \
            socket.create_connection((str(here.lab.origin.address(version)), PORT)) as peer:
        here.knows_peer(peer.getsockname()[1])
        reports = []
        for _ in range(passes):
            exchange(peer, b"before")
            reports.append(here.pass_once())
        here.release()
    return reports


def spent_ms(report: dict[str, Any]) -> float:
    """What of the stall the destination's own work is."""
    return sum(one["ms"] for one in report["steps"] if one["side"] == "destination"
               and one["name"] in ("restore", "graft", "activate"))


def _summary(values_ms: list[float]) -> dict[str, float]:
    ordered = sorted(values_ms)
    return {"median_ms": round(statistics.median(ordered), 3), "p90_ms": round(ordered[len(ordered) * 9 // 10], 3),
            "worst_ms": round(ordered[-1], 3)}


def measure(passes: int, version: int) -> dict[str, Any]:
    grafted, received = in_place(passes, version), into_receivers(passes, version)
    return {"passes": passes, "ip": version, "other_client": _summary(grafted["pass"]),
            "dry_run": _summary(grafted["dry_run"]),
            "held": _summary([one["stall_ms"] for one in grafted["reports"]]),
            "work_in_place": _summary([spent_ms(one) for one in grafted["reports"]]),
            "work_into_receiver": _summary([spent_ms(one) for one in received])}


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench graft", description=__doc__.split("\n")[0])
    parser.add_argument("--passes", type=int, default=50)
    parser.add_argument("--ip", type=int, choices=(4, 6), default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ask:
        ask_all_the_time(arguments.ask, PORT)
        return 0
    result = measure(arguments.passes, arguments.ip)
    own_ms = result["work_in_place"]["median_ms"] - result["work_into_receiver"]["median_ms"]
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{result['passes']} passes over SSH, IPv{result['ip']}; own part of the stall {own_ms:.3f} ms")
        print(f"{'':32}{'median':>9}{'p90':>9}{'worst':>9}  ms")
        for name in ("other_client", "dry_run", "held", "work_in_place", "work_into_receiver"):
            one = result[name]
            print(f"{name.replace('_', ' '):32}{one['median_ms']:9.3f}{one['p90_ms']:9.3f}{one['worst_ms']:9.3f}")
    return int(result["other_client"]["median_ms"] > STOP_MS or own_ms > OWN_MS)


if __name__ == "__main__":
    sys.exit(main())
