"""Passes while the network loses, repeats, delays and reorders packets: no byte is wrong, and nothing was sent that
contradicts what was sent before. `./dev bench badnet` has a thousand of them."""

from __future__ import annotations

import re

import pytest

from attempt import conversation, exchange
from badnet import LOADS, Cell, cells
from criu_tcpcp.core.errors import UsageError
from criu_tcpcp.passing import check_options
from world import PORT, World

pytestmark = pytest.mark.root


def clean(cell: Cell, passes: int) -> None:
    cell.run(passes)
    assert (cell.wrong, cell.violations) == ([], [])
    assert cell.passes == passes


def time_out_ms(here: World) -> int:
    """The owner's retransmission time-out; ss leaves the one out that a socket has without a sample."""
    said = here.owner.run(["ss", "-tinH", "state", "established", "sport", "=", str(PORT)]).stdout
    found = re.search(r"\brto:(\d+)", said)
    return int(found[1]) if found is not None else 3000


def test_the_destination_goes_on_with_what_was_learnt_of_the_path_unless_it_is_another() -> None:
    """Before a word was said there."""
    with conversation() as (here, peer):
        exchange(peer, b"hello")
        before = time_out_ms(here)
        assert here.pass_once()["congestion"] == "keep"
        assert time_out_ms(here) <= before + 4  # a tick of the kernel's
        exchange(peer, b"there")
        said = here.owner.run(here.pass_argv("--congestion", "restart", "--dry-run")).stdout
        assert re.search(r'"restart \(a window of \d+ segments, a round trip of [\d.]+ ms so far\)"', said)
        assert here.pass_once("--congestion", "restart")["congestion"] == "restart"
        assert time_out_ms(here) == 3000
        exchange(peer, b"and back")


def test_no_other_word_is_taken_for_a_choice() -> None:
    with pytest.raises(UsageError, match="keep or restart"):
        check_options({"congestion": "reset"})


@pytest.mark.parametrize("cell", [Cell(0.01, 1, LOADS[0], 4, 11), Cell(0.05, 20, LOADS[1], 6, 12),
                                  Cell(0.05, 20, LOADS[2], 4, 13)], ids=str)
def test_there_and_back_over_a_bad_network(cell: Cell) -> None:
    clean(cell, 2)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("cell", cells(101), ids=str)
def test_there_and_back_over_every_bad_network(cell: Cell) -> None:
    clean(cell, 10)
