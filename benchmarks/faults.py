"""Faults in passes, one or two in each, all of them judged (tests/faults.py).

    ./dev bench faults [--doubles N] [--seed S] [--skip K]        N random pairs of faults, the same for the same seed,
                                                                 behind the first K: a long run in parts
    ./dev bench faults --everything                              every step x fault x load, one fault each
    ./dev bench faults --case STEP FAULT LOAD [THEN]             one, as a violation is told

In a pair, whoever comes to the second point is killed there, a recovery or a `resolve` too. Ends with a table: who had
the connection afterwards, how long it took to settle, violations. Exit status 1 where there was one.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import itertools
import multiprocessing
import random
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from criu_tcpcp.core.handoff import DESTINATION, ORIGIN, DestinationState, OriginState
from faults import FAULTS, LOADS, STEPS, Case, Outcome, play

_RECOVERING = {OriginState.DOUBT, OriginState.UNCONFIRMED, OriginState.LETTING_GO, OriginState.LET_GO}
_ASKED = {DestinationState.ASKED, DestinationState.INTERRUPTED}


def recovery_points() -> list[str]:
    """Where those who continue what others began can be killed."""
    points = {f"resolve:{action.value}" for (state, _event), then in ORIGIN.items() if state in _RECOVERING
              for action in then.actions}
    points |= {f"recovery:{action.value}" for (state, _event), then in DESTINATION.items() if state in _ASKED
               for action in then.actions}
    return sorted(points)


def doubles(seed: int) -> Iterator[Case]:
    """Without end. The second point comes behind the first, or in a recovery."""
    chance = random.Random(seed)
    recoveries = recovery_points()
    while True:
        number = chance.randrange(len(STEPS))
        later = [*STEPS[number + 1:], *recoveries]
        yield Case(STEPS[number], chance.choice([*FAULTS]), chance.choice([*LOADS]), chance.choice(later))


def everything() -> Iterator[Case]:
    for step, fault, load in itertools.product(STEPS, FAULTS, LOADS):
        yield Case(step, fault, load)


def judged(case: Case) -> tuple[Case, Outcome | None, str]:
    """(case, what came of it, or what was wrong with it)."""
    try:
        return case, play(case), ""
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told, with the case that shows it again
        return case, None, "".join(traceback.format_exception(error, limit=-3))


def run(cases: list[Case], workers: int) -> int:
    """Print as they end; the number of violations."""
    owners: collections.Counter[str] = collections.Counter()
    settled: list[float] = []
    wrong = 0
    began = time.monotonic()
    # Each lab in a process of its own: it is the main thread that watches over one.
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for number, (case, outcome, problem) in enumerate(pool.map(judged, cases), 1):
            if outcome is None:
                wrong += 1
                words = shlex.join(["--case", case.step, case.fault, case.load, *([case.then] if case.then else [])])
                print(f"violation: ./dev bench faults {words}\n{problem}", flush=True)
            else:
                owners[outcome.owner or "none: the victim had it"] += 1
                settled.append(outcome.settled_s)
            if number % 50 == 0:
                print(f"{number} of {len(cases)}, {wrong} violations", file=sys.stderr, flush=True)
    for owner, count in owners.most_common():
        print(f"{count:6} {owner}")
    if settled:
        print(f"settled within {statistics.median(settled):.1f} s (median), {max(settled):.1f} s (worst)")
    print(f"{len(cases)} cases in {time.monotonic() - began:.0f} s, {wrong} violations")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench faults", description=__doc__.split("\n")[0])
    parser.add_argument("--doubles", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0, metavar="K")
    parser.add_argument("--everything", action="store_true")
    parser.add_argument("--case", nargs="+", metavar="WORD")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.case:
        cases = [Case(*arguments.case)]
    elif arguments.everything:
        cases = list(everything())
    else:
        cases = list(itertools.islice(doubles(arguments.seed), arguments.skip, arguments.skip + arguments.doubles))
    return 1 if run(cases, arguments.workers) else 0


if __name__ == "__main__":
    sys.exit(main())
