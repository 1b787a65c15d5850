"""How long the peer waits when others move its connection, beside our pass: all in one run, on one machine.

    ./dev bench others [--rounds 30] [--fetch | --criu PATH --passt PATH] [--json]

Each way has a connection of its own, on which a peer asks 1000 times a second, and moves it `--rounds` times:

- nothing: a second in which nobody does anything, to know what the machine adds;
- SCM_RIGHTS: two processes of one host, both made for it, hand the socket and its state over (ways/handover.py);
- criu-tcpcp pass: to the other host and back, over SSH; the whole command, though most of it stops nothing;
- criu: `dump --tcp-established` of a small process (ways/echo.c), its images to the other host over an SSH connection
  that stands already, `restore` from there. It is restored where it was: to move its address, and to tell the network,
  is not in the figure, which is the least that CRIU can do;
- passt: its migration of a guest's flows from host to host, with a hypervisor that has no machine to move
  (ways/hypervisor.py); the guest's address moves too. Each connection is moved once, and watched for a while then.

A move's stall is the longest response that it touched: one under way between its begin and 10 ms after its end.
Applications, peer, criu and the copy have precedence on the processors, as our own command takes it in its freeze.
`again` counts the segments that the peer's kernel retransmitted, for each move.

What does not work here is left out, with its own reason. `--fetch` gets newer ones (newer.py).
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import newer
from criu_tcpcp.lab import Lab
from ways import Unfit, criu, passt
from ways.unwinding import unwinding
from ways.watched import PEER, PRECEDENCE, Watched, figures, pause
from world import PORT, Peer, Program, World, world

_IDLE_S = 1.0      # as long as a whole pass


def idle_and_passed(rounds: int) -> list[dict[str, Any]]:
    """Two connections of the same programs: one that is left alone, and one that is passed."""
    results = []
    for name, action in (("nothing", _nothing), ("criu-tcpcp pass, another host, SSH", _pass)):
        with world("rr", captured=False, own_processors=True) as here:
            watched = Watched(here.lab, Peer(here, *PEER).program)
            for _ in range(rounds):
                watched.move(action, here)
            results.append(figures(name, [watched.seen()]))
            here.release()
    return results


def _nothing(_here: World) -> dict[str, float]:
    pause(_IDLE_S)
    return {}


def _pass(here: World) -> dict[str, float]:
    report = here.pass_once()
    return {"packets held": report["stall_ms"]}


def handed_over(rounds: int) -> dict[str, Any]:
    """Between two processes of the origin, there and back."""
    program = str(Path(__file__).parent / "ways" / "handover.py")
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with Lab() as lab:
        with ends[0], ends[1]:
            both = [Program(lab.origin, [*PRECEDENCE, sys.executable, program, str(end.fileno()), *options],
                            stdin=subprocess.PIPE, pass_fds=(end.fileno(),))
                    for end, options in zip(ends, (["--port", str(PORT)], []), strict=True)]
        both[0].wait_for("listening")
        watched = Watched.asking(lab)
        both[0].wait_for("serving")
        for number in range(rounds):
            watched.move(_hand_over, both[number % 2], both[1 - number % 2])
        return figures("SCM_RIGHTS on one host", [watched.seen()])


def _hand_over(giver: Program, taker: Program) -> dict[str, float]:
    served = taker.count("serving")
    assert giver.process.stdin is not None
    giver.process.stdin.write("hand over\n")
    giver.process.stdin.flush()
    taker.wait_for("serving", served + 1)
    return {}


def measure(rounds: int, tools: dict[str, list[Path]]) -> dict[str, Any]:
    """`tools`: the programs of criu, and of passt, by these names; what there is not is not measured."""
    idle, ours = idle_and_passed(rounds)
    ways, missing = [idle, handed_over(rounds), ours], {}
    for name, moves in (("criu", criu.moves), ("passt", passt.moves)):
        try:
            ways.append(moves(*tools[name], rounds=rounds))
        except Unfit as why:
            missing[name] = str(why)
    for one in ways:
        one["to_ours"] = round(one["stall"]["median_ms"] / ours["stall"]["median_ms"], 3)
    return {"rounds": rounds, "ways": ways, "not_measured": missing}


def show(result: dict[str, Any]) -> None:
    print(f"{result['rounds']} moves each; the peer asks 1000 times a second, over IPv4; its longest response, in ms")
    print(f"{'':42}{'median':>9}{'p90':>9}{'worst':>9}{'to ours':>9}{'again':>7}")
    for one in result["ways"]:
        print(f"{one['way']:42}{_figures(one['stall'])}{one['to_ours']:9.2f}{one['sent_again']:7.2f}")
        for step, times in one["steps"].items():
            print(f"    {step:38}{_figures(times)}")
        print(f"    {'a usual response':38}{one['usual_ms']:9.3f}")
        for saw, count in one.get("lost", {}).items():
            print(f"    {count} of {one['moves']} connections were lost soon after the move; the peer saw: {saw}")
    for name, why in result["not_measured"].items():
        print(f"{name}: not measured: {why}")
    if result["not_measured"]:
        print("(--fetch gets newer ones; --criu PATH, --passt PATH)")


def _figures(summary: dict[str, float]) -> str:
    return "".join(f"{summary[name]:9.3f}" for name in ("median_ms", "p90_ms", "worst_ms"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench others", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--criu", metavar="PATH", help="which criu; default: the one in PATH")
    parser.add_argument("--passt", metavar="PATH", help="which passt, and the passt-repair beside it; default: as criu")
    parser.add_argument("--fetch", action="store_true", help="newer ones than this Debian's, kept in ~/.cache")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.fetch and (arguments.criu or arguments.passt):
        parser.error("--fetch brings its own criu and passt")
    beside = Path(arguments.passt or "passt")
    tools = {"criu": [Path(arguments.criu or "criu")], "passt": [beside, beside.with_name("passt-repair")]}
    with unwinding():
        try:
            if arguments.fetch:
                tools = {name: newer.fetch(name) for name in tools}
        except newer.FetchError as error:
            print(f"others: {error}", file=sys.stderr)
            return 1
        result = measure(arguments.rounds, tools)
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
