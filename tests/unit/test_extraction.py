"""The state in the journal: what was saved is read again, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_tcpcp.core.errors import ProtocolError
from criu_tcpcp.origin.extraction import parts_of


def saved(parts: list[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


@given(st.lists(st.binary(max_size=50), min_size=4, max_size=4))
def test_what_was_saved_is_read(parts: list[bytes]) -> None:
    assert list(parts_of(saved(parts))) == parts


@given(st.lists(st.binary(max_size=9), max_size=6).filter(lambda parts: len(parts) != 4))
def test_another_number_of_parts_is_refused(parts: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        parts_of(saved(parts))


def test_wherever_it_was_cut_short_it_is_refused() -> None:
    whole = saved([b"inet", b"stream", b"{}", b"state"])
    for length in range(len(whole)):
        with pytest.raises(ProtocolError):
            parts_of(whole[:length])
    with pytest.raises(ProtocolError):
        parts_of(whole + b"x")


def test_a_length_that_lies_is_refused() -> None:
    for length in (1 << 32, (1 << 64) - 1):
        with pytest.raises(ProtocolError):
            parts_of(length.to_bytes(8, "big") + bytes(100))
