"""Every step of a pass x every fault x every load: exactly one owner, right bytes, nothing left (tests/faults.py).

Each step meets every fault in `./dev test --all`, under a load that goes round; in every run, two of them, so chosen
that each fault meets each load. All loads, and two faults in one pass, are `./dev bench faults`.
"""

from __future__ import annotations

from typing import Any

import pytest

from faults import FAULTS, LOADS, STEPS, Case, play

pytestmark = pytest.mark.root

#: The other side notices by its time-outs only.
SLOW = frozenset({"link stalled", "origin gone", "destination gone"})
EACH_TIME = 2
QUICK = [fault for fault in FAULTS if fault not in SLOW]
#: What went wrong once, in every run.
ONCE_WRONG = frozenset({("origin:redirect", "errno"), ("destination:send active", "destination gone")})


def cases() -> list[Any]:
    """Long but for `EACH_TIME` of the quick faults a step, in turn, and one of the slow ones every few steps."""
    found = []
    for number, step in enumerate(STEPS):
        chosen = {QUICK[(EACH_TIME * number + turn) % len(QUICK)] for turn in range(EACH_TIME)}
        for turn, fault in enumerate(FAULTS):
            load = list(LOADS)[(number + turn) % len(LOADS)]
            often = (fault in chosen or (step, fault) in ONCE_WRONG
                     or (fault in SLOW and number % 9 == 3 * sorted(SLOW).index(fault)))
            case = Case(step, fault, load)
            found.append(pytest.param(case, id=str(case), marks=() if often else pytest.mark.long))
    return found


@pytest.mark.parametrize("case", cases())
def test_one_owner_and_nothing_left(case: Case) -> None:
    play(case)


def test_every_run_has_each_step_and_each_fault_under_each_load() -> None:
    often = [one.values[0] for one in cases() if not one.marks]
    assert {case.step for case in often} == set(STEPS)
    assert {(case.fault, case.load) for case in often if case.fault not in SLOW} \
        >= {(fault, load) for fault in QUICK for load in LOADS}
