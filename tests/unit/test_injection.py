"""The code that is put into a program, and what is read of the program to do so."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_tcpcp.core.errors import Refused
from criu_tcpcp.kernel import injection

SLOT = 192
FULL = -(1 << 62) - 1  # needs the longest instruction
NUMBERS = st.integers(-(1 << 63), (1 << 63) - 1)
LONGEST = [
    injection.Calls(((41, 10, 1 << 19 | 1, 6),), undo=((3, injection.RESULT),)),
    injection.Calls(((233, 1 << 30, 1, 1 << 30, injection.DATA),), data=bytes(12)),
    injection.Calls(((292, 1 << 30, 1 << 30, 1 << 19),)),
]


@pytest.mark.parametrize("calls", LONGEST)
def test_every_stub_fits_into_its_slot(calls: injection.Calls) -> None:
    stub = injection._stub(calls, [FULL] * 27, FULL & (1 << 64) - 1, 0x7FFF_F7FC_1A40)
    assert len(stub) == SLOT
    assert stub.endswith(b"tcpcpstb")


def test_one_that_does_not_fit_is_an_error_and_not_cut() -> None:
    calls = injection.Calls(((233, FULL, FULL, FULL, FULL),) * 3)
    with pytest.raises(ValueError, match="fits into no slot"):
        injection._stub(calls, [FULL] * 27, 0, 0x7FFF_F7FC_1A40)


@pytest.mark.parametrize(("number", "result", "back", "again"), [
    (0, -512, 0, True), (0, -513, 0, True), (34, -514, 34, True), (35, -516, 219, True), (232, -4, 232, True),
    (0, -4, -4, False), (39, 4242, 4242, False), (0, 0, 0, False)])
def test_an_interrupted_call_begins_again_as_the_kernel_would_begin_it(number: int, result: int, back: int,
                                                                       again: bool) -> None:
    words = [0] * 27
    words[15], words[10], words[16] = number, result, 0x5555_0000_1000
    stub = injection._stub(LONGEST[0], words, 0, 0x7FFF_F7FC_1A40)
    jump = stub.index(b"\xff\x25\0\0\0\0")
    assert int.from_bytes(stub[jump + 6:jump + 14], "little") == 0x5555_0000_1000 - 2 * again
    assert stub[:jump].endswith(injection._load(10, back))


@given(st.sampled_from([7, 10, 11, 12, 13, 14, 6]), NUMBERS)
def test_a_register_is_loaded_whole(register: int, value: int) -> None:
    code = injection._load(register, value)
    data = code[-8:] if len(code) == 10 else code[-4:]
    assert int.from_bytes(data, "little") == value & (1 << 64) - 1


@given(st.binary(max_size=200), st.booleans())
def test_a_vdso_of_any_content_is_measured_or_refused(content: bytes, is_elf: bool) -> None:
    with contextlib.suppress(Refused):
        assert injection._image_size((b"\x7fELF\x02" if is_elf else b"") + content) >= 0
