"""What the tests of the matrix of states tell the end of the run: how many cells, and what became of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest

#: Properties of a test's report, which also reach the end of a run with several workers.
CELLS, OUTCOME = "cells of the matrix", "outcomes of the matrix"
PASSED = "passed"


def summary(reports: Iterable[pytest.TestReport]) -> str | None:
    """One line; None where no cell was played."""
    count, outcomes = 0, Counter[str]()
    for report in reports:
        for name, value in report.user_properties:
            if name == CELLS:
                count += int(str(value))
            elif name == OUTCOME and isinstance(value, list):
                outcomes.update(value)
    if not count:
        return None
    passed = outcomes.pop(PASSED, 0)
    why = ", ".join(f"{times} {reason}" for reason, times in sorted(outcomes.items()))
    refused = outcomes.total()
    return (f"matrix of states: {count} cells, {passed} passed, {refused} refused{f' ({why})' if why else ''}, "
            f"{count - passed - refused} failed")
