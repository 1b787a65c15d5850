"""Streams, the checker that locates faults, the responder that hands over, and the peer programs over loopback."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from criu_tcpcp.lab.answering import Pace, Responder, StreamEnd, answer
from criu_tcpcp.lab.load import PeerError, Stalls, stream
from criu_tcpcp.lab.streams import BLOCK, Checker, Fault, Stream


def first_difference(one: bytes, two: bytes) -> int:
    return next(i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y)


def check(data: bytes, seed: int = 5, length: int | None = None, chunk: int = 777) -> Fault | None:
    checker = Checker(seed)
    for place in range(0, len(data), chunk):
        checker.feed(data[place:place + chunk])
    return checker.finish(length)


@given(st.integers(0, 3 * BLOCK), st.integers(0, 200_000), st.integers(0, 200_000))
def test_reading_in_two_parts_is_reading_at_once(offset: int, one: int, two: int) -> None:
    stream_ = STREAM
    assert stream_.read(offset, one) + stream_.read(offset + one, two) == stream_.read(offset, one + two)


STREAM = Stream(5)


@pytest.mark.parametrize("offset", [0, 64, BLOCK - 64, BLOCK, 123_456 * 64, (1 << 32) + 64, (1 << 47) + 64])
def test_a_stamp_is_its_own_offset(offset: int) -> None:
    assert int.from_bytes(STREAM.read(offset, 8), "little") == offset


def test_seeds_differ_and_digests_agree() -> None:
    length = BLOCK + 1000
    assert Stream(1).read(0, 4096) != Stream(2).read(0, 4096)
    assert Stream(5).read(0, length) == STREAM.read(0, length)
    assert STREAM.sha256(length) == hashlib.sha256(STREAM.read(0, length)).hexdigest()
    with pytest.raises(ValueError, match="no bytes"):
        STREAM.read(-1, 1)


@given(st.lists(st.integers(0, 5000), max_size=30))
def test_an_intact_stream_passes_in_any_pieces(sizes: list[int]) -> None:
    checker = Checker(5, sha256=True)
    offset = 0
    for size in sizes:
        checker.feed(memoryview(STREAM.read(offset, size)))
        offset += size
    assert checker.finish(offset) is None
    assert not checker.wrong
    assert checker.sha256 == STREAM.sha256(offset)


@given(st.integers(0, 99_000), st.integers(1, 200), st.integers(1, 4000))
def test_changed_bytes_are_located(place: int, length: int, chunk: int) -> None:
    data = bytearray(STREAM.read(0, 100_000))
    for index in range(place, place + length):
        data[index] ^= 0x5A
    assert check(bytes(data), chunk=chunk, length=100_000) == Fault("changed", place, length)


@given(st.integers(0, 90_000), st.integers(1, 9000), st.integers(1, 4000))
def test_lost_bytes_are_located(place: int, length: int, chunk: int) -> None:
    whole = STREAM.read(0, 100_000)
    data = whole[:place] + whole[place + length:]
    assert check(data, chunk=chunk) == Fault("lost", first_difference(data, whole), length)


@given(st.integers(1, 90_000), st.integers(1, 9000), st.integers(1, 4000))
def test_duplicated_bytes_are_located(place: int, length: int, chunk: int) -> None:
    whole = STREAM.read(0, 100_000)
    length = min(length, place)
    data = whole[:place] + whole[place - length:]
    assert check(data, chunk=chunk) == Fault("duplicated", first_difference(data, whole), length)


@settings(max_examples=50)
@given(st.integers(0, 50_000), st.integers(128, 20_000), st.integers(128, 20_000), st.integers(1, 4000))
def test_swapped_pieces_are_located(place: int, one: int, two: int, chunk: int) -> None:
    whole = STREAM.read(0, 100_000)
    first, second = whole[place:place + one], whole[place + one:place + one + two]
    data = whole[:place] + second + first + whole[place + one + two:]
    assert check(data, chunk=chunk) == Fault("reordered", first_difference(data, whole), one)


def test_a_loss_of_a_whole_block_is_found_by_the_stamps_alone() -> None:
    data = STREAM.read(0, 640) + STREAM.read(640 + BLOCK, 3 * BLOCK)
    fault = check(data, chunk=65536)
    assert fault is not None
    assert (fault.kind, fault.length) == ("lost", BLOCK)
    assert 640 <= fault.offset < 648


def test_a_wrong_length_is_a_fault() -> None:
    data = STREAM.read(0, 5000)
    assert check(data, length=6000) == Fault("lost", 5000, 1000)
    assert check(data, length=4000) == Fault("surplus", 4000, 1000)
    assert check(random.Random(1).randbytes(5000)) == Fault("unknown", 0, 512)


def test_a_fault_shows_before_it_is_understood() -> None:
    checker = Checker(5)
    checker.feed(STREAM.read(0, 100) + b"?")
    assert checker.wrong
    assert checker.fault is None
    assert checker.finish() == Fault("changed", 100, 1)


def test_a_responder_hands_over_in_the_middle_of_a_request_and_of_an_answer() -> None:
    requests, answers = Stream(7), Stream(8)
    responder = Responder(7, 100, 40)
    assert responder.feed(requests.read(0, 99)) == b""
    assert responder.feed(requests.read(99, 151)) == answers.read(0, 80)
    responder.took(30)
    heir = Responder.from_state(responder.state())
    assert (heir.received, heir.requests, heir.sent) == (250, 2, 30)
    assert heir.owed() == answers.read(30, 50)
    heir.took(50)
    assert heir.feed(requests.read(250, 50)) == answers.read(80, 40)
    assert not heir.wrong
    heir.feed(requests.read(400, 100))
    assert heir.wrong
    assert heir.fault is not None
    with pytest.raises(ValueError, match="request of 0"):
        Responder(1, 0)


@contextmanager
def serving(serve: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """A server for one connection, in a thread; what `serve` raises is raised here."""
    problems: list[BaseException] = []

    def run() -> None:
        try:
            sock, _ = listener.accept()
            with sock:
                serve(sock)
        except Exception as problem:    # noqa: BLE001  raised again below
            problems.append(problem)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()[:2]
        finally:
            thread.join(30)
    if problems:
        raise problems[0]


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "criu_tcpcp.lab.load", *map(str, arguments)], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ})


def finish(process: subprocess.Popen[str], status: int = 0) -> dict[str, object]:
    assert process.stdout is not None
    with process:
        lines = process.stdout.read().splitlines()
    assert process.returncode == status, lines
    report = json.loads(lines[-1])
    assert isinstance(report, dict)
    return report




@pytest.mark.parametrize("end", ["sigterm", "eof"])
def test_rr_peer_is_answered_and_ends_when_asked(end: str) -> None:
    enough = threading.Event()

    def serve(sock: socket.socket) -> None:
        count = 0

        def counted() -> bool:
            nonlocal count
            count += 1
            if count > 30:
                enough.set()
            return False

        responder = Responder(1, 100)
        assert answer(sock, responder, stop=counted)
        assert not responder.wrong

    with serving(serve) as (host, port):
        process = start("rr-peer", host, port, "--rate", 2000, *(["--until-eof"] if end == "eof" else []))
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline().startswith("ready ")
        assert enough.wait(20)
        if end == "eof":
            process.stdin.close()
        else:
            process.send_signal(signal.SIGTERM)
        report = finish(process)
    assert report["error"] is None
    assert report["requests"] == report["answers"]
    assert int(str(report["answers"])) >= 20
    assert 0 < int(str(report["stall_p50_ns"])) <= int(str(report["stall_max_ns"]))


def test_rr_peer_does_not_notice_handovers() -> None:
    enough = threading.Event()

    def serve(sock: socket.socket) -> None:
        """Answer; after every 10th request, hand the state to another responder, as a pass would."""
        responder, seen, handovers = Responder(1, 100), 0, 0

        def ten() -> bool:
            return responder.requests >= seen + 10

        while not answer(sock, responder, stop=ten):
            responder, seen, handovers = Responder.from_state(responder.state()), responder.requests, handovers + 1
            if handovers > 20:
                enough.set()
        assert not responder.wrong

    with serving(serve) as (host, port):
        process = start("rr-peer", host, port, "--rate", 5000, "--until-eof")
        assert enough.wait(60)
        assert process.stdin is not None
        process.stdin.close()
        report = finish(process)
    assert report["error"] is None
    assert int(str(report["answers"])) > 10


@pytest.mark.parametrize("options", [["--burst", 5, "--pause", 0.01], ["--read-rate", 1 << 20]], ids=["bursts", "full"])
def test_burst_peer_is_answered_and_ends_when_asked(options: list[object]) -> None:
    enough = threading.Event()

    def serve(sock: socket.socket) -> None:
        responder = Responder(1, 100)

        def counted() -> bool:
            if responder.requests > 30:
                enough.set()
            return False

        assert answer(sock, responder, stop=counted)
        assert not responder.wrong

    with serving(serve) as (host, port):
        process = start("burst-peer", host, port, *options, "--until-eof")
        assert process.stdin is not None
        assert enough.wait(20)
        process.stdin.close()
        report = finish(process)
    assert report["error"] is None
    assert report["requests"] == report["answers"]
    assert int(str(report["answers"])) > 30
    assert report["sha256_received"] == report["sha256_expected"]


@pytest.mark.parametrize(("answer_bytes", "expected"), [(b"?" * 1000, "wrong answer"), (b"", "end of stream")])
def test_burst_peer_reports_a_wrong_answer_and_an_early_end(answer_bytes: bytes, expected: str) -> None:
    def serve(sock: socket.socket) -> None:
        sock.recv(1000, socket.MSG_WAITALL)
        sock.sendall(answer_bytes)

    with serving(serve) as (host, port):
        report = finish(start("burst-peer", host, port, "--burst", 10), status=1)
    assert expected in str(report["error"])


@pytest.mark.parametrize(("answer_bytes", "expected"), [(b"?" * 100, "wrong answer to request 0"),
                                                        (b"", "end of stream at byte 0")])
def test_rr_peer_reports_a_wrong_answer_and_an_early_end(answer_bytes: bytes, expected: str) -> None:
    def serve(sock: socket.socket) -> None:
        sock.recv(100)
        sock.sendall(answer_bytes)

    with serving(serve) as (host, port):
        report = finish(start("rr-peer", host, port, "--seconds", 10), status=1)
    assert expected in str(report["error"])


def test_stream_peer_against_a_stream_end_that_is_handed_over() -> None:
    size = 3_000_000

    def serve(sock: socket.socket) -> None:
        end = StreamEnd(2, size, 1, size)
        while not (end.done and end.eof):
            if end.step(sock):
                end, eof = StreamEnd.from_state(end.state()), end.eof
                end.eof = eof
            else:
                end.wait(sock, 10)
        assert end.fault() is None

    with serving(serve) as (host, port):
        report = finish(start("stream-peer", host, port, "--send", size, "--receive", size, "--rate", 30_000_000))
    assert report["error"] is None
    assert report["sha256_sent"] == Stream(1).sha256(size)
    assert report["sha256_received"] == Stream(2).sha256(size)


def test_a_stream_that_ends_early_is_reported() -> None:
    one, two = socket.socketpair()
    with one, two:
        two.sendall(Stream(2).read(0, 1000))
        two.shutdown(socket.SHUT_WR)
        report = stream(one, StreamEnd(1, 10, 2, 2000, sha256=True))
        assert two.recv(100) == Stream(1).read(0, 10)
    assert report["error"] == "lost: 1000 bytes at stream offset 1000"


def test_a_stream_that_stands_still_is_reported() -> None:
    one, two = socket.socketpair()
    with one, two:
        report = stream(one, StreamEnd(1, 0, 2, 100), idle_limit_s=0.01)
    assert "nothing moved for 0.01 s" in report["error"]
    assert isinstance(PeerError("x"), Exception)


def test_pacing_allows_what_is_due_and_no_burst_after_a_halt() -> None:
    pace, left = Pace(1_000_000), 10_000_000
    assert pace.allowance(50.0, 0, left) == 1000
    assert pace.allowance(50.05, 0, left) == pytest.approx(51_000, abs=1)
    assert pace.allowance(60.0, 0, left) == 1000
    assert pace.allowance(60.05, 0, 7) == 7


def test_stalls_keep_the_worst() -> None:
    stalls = Stalls()
    for number in range(100):
        stalls.add(number, 1000 + number)
    report = stalls.to_json()
    assert (report["stall_max_ns"], report["stall_p50_ns"], report["stall_p99_ns"]) == (99, 50, 99)
    assert report["stalls"][0] == {"ns": 99, "at_ns": 1099}
    assert len(report["stalls"]) == 20
