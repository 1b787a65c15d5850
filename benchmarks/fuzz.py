"""Bent input for every parser, as much as there is time for.

    ./dev fuzz [--inputs 1000000] [--seed 1] [--first 0] [--only NUMBER] [--jobs 2] [--json] [NAME...]

Each parser (tests/hostile/parsers.py) runs in a process of its own, whose address space may grow by 256 MiB. An input
that takes longer than 100 ms is tried again, five times, and its shortest time counts: a busy machine is no hang. One
that takes longer than a minute ends its parser. `--only` takes one input, and shows it: seed and number make it again.

Exit status 1 if anything but a refusal or an acceptance came of an input, or one was too slow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from hostile.parsers import PARSERS, Parser, made

MEMORY_BYTES = 256 << 20
HANG_S, TRIES, GIVEN_UP_S = 0.1, 5, 60
SHOWN = 3  # bugs of one parser


class TooLong(Exception):
    """An input took a minute."""


def outcome(parser: Parser, given: Any) -> tuple[bool, float]:
    """Whether it was accepted, and seconds."""
    began = time.perf_counter()
    try:
        parser.parse(given)
        accepted = True
    except parser.refusals:
        accepted = False
    return accepted, time.perf_counter() - began


def best_time_s(parser: Parser, seed: int, number: int, first_s: float) -> float:
    times = [first_s]
    while min(times) > HANG_S and len(times) <= TRIES:
        times.append(outcome(parser, made(parser, seed, number))[1])
    return min(times)


def work(name: str, seed: int, first: int, count: int) -> dict[str, Any]:
    """In a process of its own."""
    parser = PARSERS[name]
    warnings.filterwarnings("ignore", "Unexpected end-group tag")  # protobuf's word for what is refused then
    with contextlib.suppress(*parser.refusals):
        parser.parse(made(parser, seed, first))  # what is loaded at the first is not the input's
    base_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def end(_number: int, _frame: object) -> NoReturn:
        raise TooLong

    signal.signal(signal.SIGALRM, end)
    accepted, worst_s, worst, bugs, began = 0, 0.0, first, [], time.monotonic()
    for number in range(first, first + count):
        signal.alarm(GIVEN_UP_S)
        try:
            good, taken_s = outcome(parser, made(parser, seed, number))
        except Exception:  # noqa: BLE001 - MemoryError and TooLong are bugs as well
            bugs.append({"number": number, "traceback": traceback.format_exc()})
            continue
        finally:
            signal.alarm(0)
        accepted += good
        if taken_s > worst_s:
            taken_s = best_time_s(parser, seed, number, taken_s)
        if taken_s > worst_s:
            worst_s, worst = taken_s, number
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"parser": name, "seed": seed, "first": first, "inputs": count, "accepted": accepted,
            "refused": count - accepted - len(bugs), "bugs": bugs[:SHOWN], "bug_count": len(bugs),
            "worst_ms": round(worst_s * 1000, 1), "worst": worst, "grown_mib": round((peak_kib - base_kib) / 1024, 1),
            "seconds": round(time.monotonic() - began, 1)}


def in_a_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    argv = [sys.executable, __file__, "--work", "--seed", str(arguments.seed), "--first", str(arguments.first),
            "--inputs", str(arguments.inputs), name]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return dict(json.loads(done.stdout))
    return {"parser": name, "inputs": 0, "accepted": 0, "refused": 0, "bug_count": 1, "worst_ms": 0, "worst": 0,
            "grown_mib": 0, "seconds": 0,
            "bugs": [{"number": -1, "traceback": f"ended with status {done.returncode}: {done.stderr[-2000:]}"}]}


def show_one(parser: Parser, seed: int, number: int) -> int:
    given = made(parser, seed, number)
    print(f"{given!r}"[:4000])
    accepted, taken_s = outcome(parser, given)
    print(f"{'accepted' if accepted else 'refused'} in {taken_s * 1000:.1f} ms")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev fuzz", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(PARSERS)}")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="for each parser (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this input alone, of one parser")
    parser.add_argument("--jobs", type=int, default=2, help="parsers at once (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a parser")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.names or list(PARSERS)
    unknown = [name for name in names if name not in PARSERS]
    if unknown or (arguments.only is not None and len(names) != 1):
        parser.error(f"no parser {unknown[0]!r}" if unknown else "--only takes one parser")
    if arguments.only is not None:
        return show_one(PARSERS[names[0]], arguments.seed, arguments.only)
    if arguments.work:
        print(json.dumps(work(names[0], arguments.seed, arguments.first, arguments.inputs)))
        return 0
    if not arguments.json:
        print(f"{'parser':<18} {'inputs':>9} {'refused':>9} {'accepted':>9} {'bugs':>5} {'worst':>9} {'memory':>9}")
    bad = False
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for found in pool.map(lambda name: in_a_process(name, arguments), names):
            bad = bad or bool(found["bug_count"]) or found["worst_ms"] > HANG_S * 1000
            print(json.dumps(found) if arguments.json else
                  f"{found['parser']:<18} {found['inputs']:>9} {found['refused']:>9} {found['accepted']:>9} "
                  f"{found['bug_count']:>5} {found['worst_ms']:>6.1f} ms {found['grown_mib']:>5.1f} MiB", flush=True)
            for bug in found["bugs"] if not arguments.json else ():
                print(f"  number {bug['number']}: {bug['traceback']}", file=sys.stderr)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
