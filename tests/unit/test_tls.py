"""What is taken for TLS in a queue, and what is not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_tcpcp.core.tls import has_records


def record(kind: int = 23, version: bytes = b"\3\3", size: int = 100) -> bytes:
    return bytes([kind]) + version + size.to_bytes(2, "big") + b"x" * size


@given(st.integers(20, 24), st.integers(0, 4), st.integers(1, (1 << 14) + 2048), st.integers(5, 20000))
def test_a_record_at_the_head_is_whole_or_cut(kind: int, minor: int, size: int, kept: int) -> None:
    assert has_records(record(kind, bytes([3, minor]), size)[:kept])


@given(st.integers(1, 104), st.lists(st.integers(1, 3000), min_size=1, max_size=3))
def test_records_behind_the_rest_of_one(cut: int, sizes: list[int]) -> None:
    assert has_records(record()[cut:] + b"".join(record(size=size) for size in sizes))


@pytest.mark.parametrize("queue", [
    b"", b"\x17", record()[:4], record(19), record(25), record(version=b"\2\0"), record(version=b"\3\5"),
    b"\x17\3\3\0\0" + b"x" * 50, b"\x17\3\3\xff\xff" + b"x" * 50, b"GET / HTTP/1.1\r\nHost: test\r\n\r\n",
    b"*1\r\n$4\r\nPING\r\n", b"a word " + record()[:30], b"x" * 20000 + record() * 3])
def test_near_misses(queue: bytes) -> None:
    assert not has_records(queue)


def test_noise_is_not_tls() -> None:
    noise = random.Random(1)
    assert sum(has_records(noise.randbytes(30000)) for _ in range(300)) == 0
