"""Passes while the network loses, repeats, delays and reorders packets: no byte is wrong, and nothing was sent that
contradicts what was sent before. `./dev bench badnet` has a thousand of them."""

from __future__ import annotations

import pytest

from badnet import LOADS, Cell, cells

pytestmark = pytest.mark.root


def clean(cell: Cell, passes: int) -> None:
    cell.run(passes)
    assert (cell.wrong, cell.violations) == ([], [])
    assert cell.passes == passes


@pytest.mark.parametrize("cell", [Cell(0.01, 1, LOADS[0], 4, 11), Cell(0.05, 20, LOADS[1], 6, 12),
                                  Cell(0.05, 20, LOADS[2], 4, 13)], ids=str)
def test_there_and_back_over_a_bad_network(cell: Cell) -> None:
    clean(cell, 2)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("cell", cells(101), ids=str)
def test_there_and_back_over_every_bad_network(cell: Cell) -> None:
    clean(cell, 10)
