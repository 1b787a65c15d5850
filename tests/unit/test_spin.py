"""The model of the handoff (tests/spin), checked exhaustively by SPIN: all that can happen, within its budgets."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from criu_tcpcp.core.handoff import DESTINATION, ORIGIN, Action
from spin.promela import tables
from wrong_protocols import WRONG

MODEL = Path(__file__).parents[1] / "spin" / "handoff.pml"
#: What actions do that are not in the model; it has no use for these.
NOT_MODELLED = {Action.WRITE_INTENT, Action.QUIESCE, Action.HOLD, Action.PROBE, Action.REDIRECT, Action.REROUTE,
                Action.WRITE_PREPARED, Action.RECONNECT}


@dataclass(frozen=True)
class Verdict:
    """`assertion`: the one that failed, or ''."""

    errors: int
    states: int
    assertion: str
    output: str


def check(directory: Path, *macros: str, optimize: str = "-O0") -> Verdict:
    """Make the verifier and run it to its end, or to the first error."""
    (directory / "tables.pml").write_text(tables({name.upper(): WRONG[name] for name in WRONG}))
    (directory / "handoff.pml").write_text(MODEL.read_text())
    _run(directory, "spin", "-a", *(f"-D{one}" for one in macros), "handoff.pml")
    _run(directory, "cc", optimize, "-DSAFETY", "-DNOREDUCE", "-o", "pan", "pan.c")
    output = _run(directory, "./pan", "-m5000", "-w22")
    assert "max search depth too small" not in output, output
    errors, states = re.search(r"errors: (\d+)", output), re.search(r"(\d+) states, stored", output)
    assert errors is not None, output
    assert states is not None, output
    failed = re.search(r"pan:1: (?:assertion violated )?(.*) \(at depth", output)
    return Verdict(int(errors[1]), int(states[1]), "".join(failed[1].split()) if failed else "", output)


def _run(directory: Path, *argv: str) -> str:
    assert argv[0] == "./pan" or shutil.which(argv[0]), f"{argv[0]} is missing: ./dev setup"
    done = subprocess.run(argv, cwd=directory, text=True, capture_output=True, check=False)
    output = done.stdout + done.stderr
    assert "rror" not in output.replace("errors:", ""), output  # spin's status does not tell
    assert done.returncode == 0, output
    return output


def test_no_order_of_events_breaks_the_protocol(tmp_path: Path) -> None:
    found = check(tmp_path, optimize="-O1")
    assert found.errors == 0, found.output
    assert 1_000_000 < found.states < 10_000_000, "the model has become another: look at its budgets"


#: Enough for all but the first test.
SMALL = ("CRASHES=1", "LOSSES=1", "REORDERS=1", "IMPATIENCE=1")
TWO_OWNERS = "!((((endpoint&&!(fenced))&&!(silent))&&((sock==2)&&!(d_fence))))"


@pytest.mark.parametrize(("end", "number"), [("NOTHING", 0), ("DONE", 5), ("LOST", 6)])
def test_the_model_comes_to_every_end(tmp_path: Path, end: str, number: int) -> None:
    assert check(tmp_path, f"REACHES={end}", *SMALL).assertion == f"(journal!={number})"


@pytest.mark.parametrize(("macros", "assertion"), [
    (["RESUME_ON_A_TIMER", "ONE_OWNER_ONLY"], TWO_OWNERS),
    (["ACTIVATE_BEFORE_COMMITTED_IS_WRITTEN"], "(verdict==1)"),
    (["OFFER_BEFORE_SILENCE_AND_FENCE", "ONE_OWNER_ONLY"], TWO_OWNERS),
    (["OFFER_BEFORE_FENCE", "ONE_OWNER_ONLY"], TWO_OWNERS),
    (["ABORTED_IS_NOT_WRITTEN", "NO_LOCK", "ONE_OWNER_ONLY"], TWO_OWNERS),
])
def test_a_wrong_protocol_is_found_out(tmp_path: Path, macros: list[str], assertion: str) -> None:
    found = check(tmp_path, *macros, *SMALL)
    assert (found.errors, found.assertion) == (1, assertion), found.output


def test_the_written_verdict_alone_keeps_it_to_one_owner(tmp_path: Path) -> None:
    """Without locks, and with the right tables: that the lock also helps is not what the wrong one was found by."""
    found = check(tmp_path, "NO_LOCK", "ONE_OWNER_ONLY", *SMALL)
    assert found.errors == 0, found.output
    assert found.states > 10_000


def test_every_action_of_the_tables_is_in_the_model() -> None:
    used = {action for table in (ORIGIN, DESTINATION) for one in table.values() for action in one.actions}
    known = set(re.findall(r"_act(?:\[i\])? == A_(\w+)", MODEL.read_text()))
    assert {action.name for action in used - NOT_MODELLED} == known - {"RECONNECT"}
