"""Frames: what was said is what is heard, however the bytes arrive; anything else is a ProtocolError, never more."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_tcpcp.core import messages
from criu_tcpcp.core.errors import ProtocolError
from criu_tcpcp.core.messages import Committed, Decoder, Hello, Message, Prepare, encode

KINDS = sorted((kind for kind in vars(messages).values()
                if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message),
               key=lambda kind: kind.kind)

numbers = st.integers(-(1 << 62), 1 << 62)
texts = st.text(max_size=30)
json_values = st.recursive(st.none() | st.booleans() | numbers | texts,
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
                           max_leaves=6)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int": numbers, "str": texts, "bool": st.booleans(), "bytes": st.binary(max_size=200),
    "list[int]": st.lists(numbers, max_size=4), "list[str]": st.lists(texts, max_size=4),
    "list[Step]": st.lists(st.tuples(texts, st.integers(0, 1 << 20) | st.floats(0, 1e6)).map(list), max_size=4),
    "dict[str, Any]": st.dictionaries(texts, json_values, max_size=4),
    "list[dict[str, Any]]": st.lists(st.dictionaries(texts, json_values, max_size=4), max_size=3)}


def of_kind(kind: type[Message]) -> st.SearchStrategy[Message]:
    return st.builds(kind, **{field.name: VALUES[str(field.type)] for field in dataclasses.fields(kind)})


any_message = st.sampled_from(KINDS).flatmap(of_kind)


def frame(kind: int, header: object, blobs: bytes = b"", *, header_length: int | None = None,
          length: int | None = None) -> bytes:
    """A frame by hand, every length as it is unless said otherwise."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = struct.pack(">BI", kind, len(text) if header_length is None else header_length) + text + blobs
    return struct.pack(">I", len(body) if length is None else length) + body


def refuses(data: bytes) -> str:
    with pytest.raises(ProtocolError) as caught:
        Decoder().feed(data)
    return str(caught.value)


def test_kinds_are_numbered_once() -> None:
    assert len({kind.kind for kind in KINDS}) == len(KINDS) > 10


@given(st.lists(any_message, max_size=4), st.lists(st.integers(1, 400), max_size=60))
def test_what_was_said_is_heard_however_the_bytes_arrive(said: list[Message], cuts: list[int]) -> None:
    stream = b"".join(encode(one) for one in said)
    decoder, heard = Decoder(), list[Message]()
    for size in [*cuts, len(stream)]:
        heard += decoder.feed(stream[:size])
        stream = stream[size:]
    assert heard == said


@given(any_message)
def test_byte_by_byte_nothing_is_heard_before_the_last(said: Message) -> None:
    *front, last = (bytes([byte]) for byte in encode(said))
    decoder = Decoder()
    assert [message for byte in front for message in decoder.feed(byte)] == []
    assert decoder.feed(last) == [said]


def test_wire_format_has_not_drifted() -> None:
    assert encode(Committed("00112233445566ff")).hex() == (
        "0000002e08" "00000029" "7b22706173735f6964223a2230303131323233333434353536366666222c22626c6f6273223a5b5d7d")
    prepare = Prepare("0" * 16, "n", b"\x01", b"\x02\x03", b"{}", b"")
    assert encode(prepare)[-5:] == b"\x01\x02\x03{}"
    assert Decoder().feed(encode(prepare)) == [prepare]


def test_payload_is_not_in_the_repr() -> None:
    assert "SECRET" not in repr(Prepare("0" * 16, "n", b"SECRET", b"SECRET", b"SECRET", b"SECRET"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_length_out_of_bounds_is_refused_at_the_first_five_bytes(kind: type[Message]) -> None:
    limit = messages.MAX_FRAME + 64 if kind in (Prepare, messages.Activate) else messages.MAX_SMALL_FRAME + 64
    for length in (limit + 1, 0xFFFFFFFF, 0, 4):
        assert "out of bounds" in refuses(struct.pack(">IB", length, kind.kind))


def test_a_large_length_costs_no_memory_before_its_bytes_arrive() -> None:
    tracemalloc.start()
    try:
        assert Decoder().feed(struct.pack(">IB", messages.MAX_FRAME, Prepare.kind)) == []
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_unknown_kinds_are_refused_at_once() -> None:
    for number in set(range(256)) - {kind.kind for kind in KINDS}:
        assert "unknown kind" in refuses(struct.pack(">IB", 5, number))


@pytest.mark.parametrize("header", [
    {"blobs": []},
    {"pass_id": "x"},
    {"pass_id": "x", "blobs": [], "more": 1},
    {"pass_id": "x", "blobs": [0]},
    {"pass_id": "x", "blobs": None},
    {"pass_id": "x", "blobs": {}},
    {"pass_id": "x", "blobs": ""},
    {"pass_id": "x", "blobs": 0},
    {"pass_id": 1, "blobs": []},
    {"pass_id": None, "blobs": []},
    [], None, 1, "x", b"", b"{", b"\xff\xfe", b'{"pass_id":"x","blobs":[]}x', b"NaN", b"\0",
], ids=repr)
def test_a_header_that_is_not_the_messages_is_refused(header: object) -> None:
    refuses(frame(Committed.kind, header))


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1], 1e300])
def test_a_number_is_a_number(value: object) -> None:
    refuses(frame(7, {"pass_id": "x", "elapsed_ms": value, "blobs": []}))


@pytest.mark.parametrize("network", [["a"], [True], [1.5], [None], [[1]]])
def test_the_elements_of_a_list_of_numbers_are_numbers(network: list[object]) -> None:
    words = {"version": "", "host": "", "boot_id": ""}
    refuses(frame(Hello.kind, {"protocol": 1, **words, "network": network, "blobs": []}))


@pytest.mark.parametrize("steps", [
    ["a"], [None], [{}], [[]], [["a"]], [["a", 1, 2]], [[1, "a"]], [["a", "1"]], [["a", None]], [["a", True]],
    [["a", -1]], [["a", 1e9]], [["a", 10 ** 400]]], ids=lambda steps: repr(steps)[:30])
def test_a_step_is_a_name_and_a_time(steps: list[object]) -> None:
    """The origin makes its report of them when all is done: it must not stumble there."""
    assert Decoder().feed(frame(messages.Active.kind, {"pass_id": "", "left": [], "notes": [], "steps": [["a", 1.5]],
                                                       "blobs": []}))
    refuses(frame(messages.Active.kind, {"pass_id": "", "left": [], "notes": [], "steps": steps, "blobs": []}))


@pytest.mark.parametrize("text", [r'"\ud800"', r'["\udc80"]', r'{"a": {"\ud9ff": 1}}', "NaN", "[-Infinity]",
                                  '{"a": 1e999}'])
def test_half_a_character_and_what_is_no_number_are_refused_however_deep(text: str) -> None:
    for header in (f'{{"pass_id": {text}, "blobs": []}}', f'{{"pass_id": "", "flow": {{"x": {text}}}, "blobs": []}}'):
        for kind in (messages.Query, messages.Ask):
            refuses(frame(kind.kind, header.encode()))


def test_what_is_no_text_can_be_sent_all_the_same() -> None:
    """A file's name may be any bytes; the other side reads it with marks in their place."""
    assert Decoder().feed(encode(messages.Aborted("", "a\udcffb\u00e4"))) == [messages.Aborted("", "a?b\u00e4")]


@pytest.mark.parametrize("lengths", [
    [1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 2], [1, 1, 1, 0], [-1, 3, 1, 1], [4, 4, 4, 4], [1 << 64, 0, 0, 0],
    [True, 1, 1, 1], [1.0, 1, 1, 1], ["1", 1, 1, 1], [None, 1, 1, 1]], ids=repr)
def test_lengths_of_blobs_that_lie_are_refused(lengths: list[object]) -> None:
    good = frame(Prepare.kind, {"pass_id": "x", "nonce": "n", "blobs": [1, 1, 1, 1]}, b"abcd")
    assert len(Decoder().feed(good)) == 1
    refuses(frame(Prepare.kind, {"pass_id": "x", "nonce": "n", "blobs": lengths}, b"abcd"))


@pytest.mark.parametrize("header_length", [0, 1, 10, 1 << 16, 0xFFFFFFFF])
def test_a_length_of_the_header_that_lies_is_refused(header_length: int) -> None:
    refuses(frame(Committed.kind, {"pass_id": "x", "blobs": []}, header_length=header_length))


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting_is_refused(opening: str) -> None:
    refuses(frame(Committed.kind, (opening * 10000).encode()))
    refuses(frame(Committed.kind, b'{"pass_id":"x","blobs":' + b"[" * 30000 + b"]" * 30000 + b"}"))


def test_a_number_of_thousands_of_digits_is_refused() -> None:
    refuses(frame(7, b'{"pass_id":"x","blobs":[],"elapsed_ms":' + b"9" * 10000 + b"}"))


@given(st.binary(max_size=300))
def test_noise_is_refused_or_awaited(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        Decoder().feed(data)


@given(any_message, st.data())
def test_a_damaged_frame_is_refused_awaited_or_another_message_of_ours(said: Message, data: st.DataObject) -> None:
    damaged = bytearray(encode(said))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        heard = Decoder().feed(bytes(damaged))
    except ProtocolError:
        return
    for message in heard:
        assert Decoder().feed(encode(message)) == [message]


@given(any_message, st.data())
def test_a_header_with_a_value_of_another_type_is_refused_or_that_value(said: Message, data: st.DataObject) -> None:
    encoded = encode(said)
    length = struct.unpack_from(">I", encoded, 5)[0]
    header, blobs = json.loads(encoded[9:9 + length]), encoded[9 + length:]
    header[data.draw(st.sampled_from(sorted(header)))] = data.draw(json_values)
    try:
        heard = Decoder().feed(frame(said.kind, header, blobs))
    except ProtocolError:
        return
    assert len(heard) == 1
    for field in dataclasses.fields(heard[0]):
        if field.type in ("int", "str", "bool"):
            assert type(getattr(heard[0], field.name)).__name__ == field.type


def test_what_is_too_large_is_not_sent() -> None:
    with pytest.raises(ProtocolError):
        encode(Committed("x" * (messages.MAX_HEADER + 1)))
