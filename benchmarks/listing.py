"""How long `list` takes with many connections.

    ./dev bench listing [--sockets 10000] [--processes 4] [--rounds 5] [--json]

Servers have the connections, all with one peer, and processes and network of their own, as a host has: the peer's ends
are not listed. Listed are those of all processes there, and those of one server. Each time is that of the whole
command, from its start to its end, beside that of `--version`, which only starts Python.

Exit status 1 if the list of everything takes over a second, at the median.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from criu_tcpcp.lab import Lab
from world import COMMAND, PORT

LIMIT_S = 1.0
OF_ITS_OWN = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]


def serve(ports: int, each: int) -> None:
    """A process for each port, which accepts so many connections and holds them until it is killed."""
    raise_limit(each)
    for port in range(PORT, PORT + ports):
        listener = socket.create_server(("0.0.0.0", port), backlog=512)
        if not os.fork():
            os.write(1, b"listening\n")
            held = [listener.accept()[0] for _ in range(each)]
            os.write(1, b"accepted\n")
            while held:
                signal.pause()
        listener.close()
    signal.pause()


def raise_limit(sockets: int) -> None:
    wanted = sockets + 1000
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1])))


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def measure(sockets: int, processes: int, rounds: int) -> dict[str, Any]:
    each = sockets // processes
    raise_limit(sockets)
    with Lab() as lab, contextlib.ExitStack() as stack:
        parent = lab.origin.spawn([*OF_ITS_OWN, sys.executable, __file__, "--serve", str(processes), str(each)],
                                  stdout=subprocess.PIPE)
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(processes)] == [b"listening\n"] * processes
        for number in range(processes):
            with lab.peer.enter():
                for _ in range(each):
                    stack.enter_context(socket.create_connection((str(lab.origin.ipv4), PORT + number)))
        assert [parent.stdout.readline() for _ in range(processes)] == [b"accepted\n"] * processes
        inside = children(parent.pid)[0]  # its first process
        enter = ["nsenter", "--target", str(inside), "--pid", "--mount"]

        def timed(*arguments: str) -> tuple[float, str]:
            begun = time.monotonic()
            said = lab.origin.run([*enter, COMMAND, *arguments], timeout=120).stdout
            return time.monotonic() - begun, said

        found: dict[str, list[float]] = {"start": [], "all": [], "one_process": []}
        for _ in range(rounds):
            found["start"].append(timed("--version")[0])
            took, said = timed("list", "--json")
            rows = [json.loads(line) for line in said.splitlines()]
            passable = [row["pid"] for row in rows if row["passable"]]
            assert len(passable) == each * processes
            found["all"].append(took)
            found["one_process"].append(timed("list", "--pid", str(passable[0]))[0])
    return {"sockets": each * processes, "processes": processes, "rounds": rounds} | {
        name: {"median_s": round(statistics.median(times), 3), "best_s": round(min(times), 3),
               "worst_s": round(max(times), 3)} for name, times in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench listing", description=__doc__.split("\n")[0])
    parser.add_argument("--sockets", type=int, default=10000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return 0
    result = measure(arguments.sockets, arguments.processes, arguments.rounds)
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{result['sockets']} connections of {result['processes']} processes, {result['rounds']} rounds")
        print(f"{'':14}{'median':>8}{'best':>8}{'worst':>8}  s")
        for name in ("start", "all", "one_process"):
            one = result[name]
            print(f"{name.replace('_', ' '):14}{one['median_s']:8.3f}{one['best_s']:8.3f}{one['worst_s']:8.3f}")
    return int(result["all"]["median_s"] > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
