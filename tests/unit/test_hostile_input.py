"""Every parser answers what is bent, cut short or made up with an error of ours, and with nothing else.

A few hundred inputs each; `./dev fuzz` tries as many as there is time for, and watches time and memory.
"""

from __future__ import annotations

import contextlib
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostile.parsers import PARSERS, Parser, made

SEEDED = 400

pytestmark = pytest.mark.filterwarnings("ignore:Unexpected end-group tag")  # protobuf's own word for it

every_parser = pytest.mark.parametrize("parser", PARSERS.values(), ids=lambda one: one.name)


@every_parser
def test_what_is_bent_is_refused_or_sound(parser: Parser) -> None:
    """And some of both, or the inputs would prove nothing. The same inputs at every run."""
    refused = 0
    for number in range(SEEDED):
        try:
            parser.parse(made(parser, 0, number))
        except parser.refusals:
            refused += 1
        except Exception as error:
            error.add_note(f"./dev fuzz --seed 0 --only {number} {parser.name!r}")
            raise
    assert parser.never_refuses or refused > SEEDED // 50
    assert refused < SEEDED - SEEDED // 50


@every_parser
def test_what_hypothesis_makes_of_it_is_refused_or_sound(parser: Parser) -> None:
    """It chooses where the mutations choose by chance, and shrinks what it finds."""
    @settings(max_examples=60)
    @given(st.randoms(use_true_random=False))
    def tried(rng: Random) -> None:
        with contextlib.suppress(*parser.refusals):
            parser.parse(parser.make(rng))

    tried()


def test_an_input_is_made_again_by_its_number() -> None:
    for parser in PARSERS.values():
        assert repr(made(parser, 3, 7)) == repr(made(parser, 3, 7))
