"""The destination believes nothing that the origin says about itself: each lie is refused, and nothing of it stays.

A real `serve` in a host of the lab, without SSH before it; the origin is this file, which says what it likes.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from criu_tcpcp import journal
from criu_tcpcp.application import Receiver
from criu_tcpcp.core import messages
from criu_tcpcp.core.endpoint import Endpoint, Flow
from criu_tcpcp.core.image import Image, encode, encode_inet_sk
from criu_tcpcp.core.messages import Aborted, Message, Prepare, Prepared, Query, Refused, Stage, Staged
from criu_tcpcp.core.tcp import TcpState
from criu_tcpcp.kernel.rules import MARK
from criu_tcpcp.lab import Lab, leftovers
from criu_tcpcp.transport.wire import Wire
from states import plain
from world import COMMAND, PORT

pytestmark = pytest.mark.root

PATIENCE_S = 60
OPTIONS = {"SO_SNDBUF": 87040, "SO_RCVBUF": 131072, "SO_RCVTIMEO": (0, 0), "SO_SNDTIMEO": (0, 0),
           "SO_BINDTODEVICE": "", "SO_ATTACH_FILTER": "", "SO_LINGER": (0, 0)}
UNKNOWN = "the destination does not have it"


class Door:
    """`serve`, and an honest beginning."""

    def __init__(self, lab: Lab, receiver: Path) -> None:
        self.lab = lab
        self.into = f"receiver:{receiver}"
        self.flow = Flow(Endpoint(lab.origin.ipv4, PORT), Endpoint(lab.peer.ipv4, 40000))
        self.serve = lab.destination.spawn([COMMAND, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           stderr=subprocess.PIPE)
        assert self.serve.stdin is not None
        assert self.serve.stdout is not None
        self.wire = Wire(self.serve.stdout.fileno(), self.serve.stdin.fileno())
        self.wire.send(messages.Hello(messages.PROTOCOL, "x", "x", "x", []))
        assert isinstance(self.hear(), messages.Hello)
        self.before = leftovers(lab.destination)
        self.pass_id = ""

    def hear(self) -> Message:
        return self.wire.receive(PATIENCE_S)

    def stage(self, **changes: Any) -> Message:
        self.pass_id = journal.new_id()
        honest = Stage(self.pass_id, self.flow.to_json(), self.into, "auto",
                       encode_inet_sk(self.flow, TcpState.ESTABLISHED, False, OPTIONS, 5), 500)
        self.wire.send(replace(honest, **changes))
        return self.hear()

    def image(self, **changes: Any) -> Image:
        return encode(plain(flow=self.flow, options=OPTIONS) if not changes
                      else plain(**{"flow": self.flow, "options": OPTIONS} | changes))

    def prepare(self, its_nonce: str, image: Image | None = None, **changes: Any) -> Prepare:
        image = image or self.image()
        return replace(Prepare(self.pass_id, its_nonce, image.inet_sk, image.tcp_stream, image.extras, b""), **changes)

    def is_as_before(self) -> None:
        """It knows nothing of the pass any more, and nothing of it is left."""
        self.wire.send(Query(self.pass_id))
        answer = self.hear()
        if isinstance(answer, Aborted) and answer.reason != UNKNOWN:  # of the pass itself
            answer = self.hear()
        assert answer == Aborted(self.pass_id, UNKNOWN)
        assert leftovers(self.lab.destination) == self.before
        assert self.lab.destination.run(["ss", "-tanH", "sport", "=", str(PORT)]).stdout == ""


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    path = tmp_path_factory.mktemp("receiver") / "x.sock"
    with Lab() as lab, Receiver(path=path):
        made = Door(lab, path)
        yield made
        assert made.serve.poll() is None, "serve did not survive"
        assert made.serve.stdin is not None
        assert made.serve.stderr is not None
        made.serve.stdin.close()
        assert made.serve.wait(PATIENCE_S) == 0
        assert made.serve.stderr.read() == b""


FLOW = {"local": ["10.77.2.11", PORT], "peer": ["10.77.1.2", 40000], "mapped": False, "scope_id": 0}
V6 = {"local": ["fd00:77::1", PORT], "peer": ["fd00:77:1::2", 40000], "mapped": False, "scope_id": 0}


def of(base: dict[str, Any], **ends: Any) -> dict[str, Any]:
    return base | {name: [address, 40000] for name, address in ends.items()}


FLOWS = [
    of(FLOW, peer="127.0.0.1"), of(FLOW, local="127.0.0.1"), of(FLOW, peer="224.0.0.1"), of(FLOW, local="224.0.0.1"),
    of(FLOW, peer="0.0.0.0"), of(FLOW, local="0.0.0.0"), of(FLOW, peer="255.255.255.255"),
    of(FLOW, local="255.255.255.255"), of(FLOW, peer="169.254.1.1"), of(V6, peer="::1"), of(V6, local="::"),
    of(V6, peer="ff02::1"), of(V6, peer="fe80::1"), of(V6, peer="fe80::1%eth0"), of(V6, peer="::ffff:10.77.1.2"),
    V6 | {"mapped": True}, of(FLOW, peer="fd00:77:1::2"), V6 | {"scope_id": 1 << 40}, V6 | {"scope_id": -1},
    FLOW | {"peer": ["10.77.1.2", 0]}, FLOW | {"peer": ["10.77.1.2", 1 << 16]}, FLOW | {"more": 1}, {},
    of(FLOW, peer="203.0.113.9/0"), of(FLOW, peer="dest")]


def test_connections_that_cannot_be(door: Door) -> None:
    for flow in FLOWS:
        assert isinstance(door.stage(flow=flow), Refused), flow
    door.is_as_before()


def test_a_peer_that_is_the_destination_itself(door: Door) -> None:
    flow = replace(door.flow, peer=Endpoint(door.lab.destination.ipv4, 40000))
    answer = door.stage(flow=flow.to_json())
    assert isinstance(answer, Refused)
    assert "is the destination host itself" in answer.reason
    door.is_as_before()


def test_ids_that_could_be_a_path(door: Door) -> None:
    for pass_id in ("", "../../../../etc", "0" * 15, "0" * 17, "0" * 15 + "/", "0" * 16 + "\n", "A" * 16, "\0" * 16,
                    "\uff10" * 16, "0123456789abcde.", "x" * 20000):
        assert isinstance(door.stage(pass_id=pass_id), Refused), pass_id
    door.is_as_before()


WAYS = ["", "exec:sh", "receiver:/nonexistent", "receiver:/etc/passwd", "receiver:/", "receiver:" + "x" * 5000,
        "receiver:\0abstract", "receiver:/run/\0/x", "auto\0", "auto:", "listen:0", "listen:70000", "listen:1",
        "accept:0", "accept:-1", "accept:999999999", "accept:1e9", "accept:\u0661", "pid:999999999", "pid:0:0",
        "pid:1:2:3", "pid::"]


def test_ways_in_that_are_none(door: Door) -> None:
    """`serve` itself cannot be stopped by itself."""
    for into in (*WAYS, f"pid:{door.serve.pid}:0"):
        assert isinstance(door.stage(into=into), Refused), into
    door.is_as_before()


def test_entries_and_prologues_that_cannot_be(door: Door) -> None:
    lies: list[dict[str, Any]] = [
        {"inet_sk": b""}, {"inet_sk": b"\xff" * 100}, {"inet_sk": bytes(60000)},
        {"prologue": bytes(messages.MAX_PROLOGUE + 1), "has_prologue": True}, {"prologue": b"x", "has_prologue": True}]
    for changes in lies:
        assert isinstance(door.stage(**changes), Refused), str(changes)[:50]
    door.is_as_before()


def test_the_honest_one_is_taken(door: Door) -> None:
    """Else none of this would prove anything."""
    staged = door.stage()
    assert isinstance(staged, Staged), staged
    door.wire.send(door.prepare(staged.nonce))
    assert door.hear() == Prepared(door.pass_id)
    assert leftovers(door.lab.destination) != door.before
    door.wire.send(messages.Abort(door.pass_id, "enough"))
    door.is_as_before()


def states(door: Door) -> dict[str, Image]:
    """Lies about the state, by what they lie about."""
    good = door.image()
    other = replace(door.flow, peer=replace(door.flow.peer, port=40001))
    extras = json.loads(good.extras)
    return {
        "another connection": door.image(flow=other),
        "another address": door.image(flow=replace(door.flow, local=Endpoint(door.lab.destination.ipv4, PORT))),
        "our own mark": door.image(options=OPTIONS | {"SO_MARK": MARK}),
        "a device that is none": door.image(options=OPTIONS | {"SO_BINDTODEVICE": "nonexistent"}),
        "congestion control": door.image(options=OPTIONS | {"TCP_CONGESTION": "nonexistent"}),
        "a queue that is longer": replace(good, tcp_stream=good.tcp_stream + b"x"),
        "a queue that is shorter": replace(good, tcp_stream=good.tcp_stream[:-1]),
        "no queues": replace(good, tcp_stream=b""),
        "endless extras": replace(good, extras=b" " * (1 << 20) + good.extras),
        "an unknown option": replace(good, extras=json.dumps(extras | {"options": {"SO_X": 1}}).encode()),
        "nesting": replace(good, extras=b"[" * 60000),
        "no entry": replace(good, inet_sk=b""),
        "a listener": replace(good, inet_sk=encode_inet_sk(door.flow, TcpState.LISTEN, False, OPTIONS, 5))}


LIES = ["another connection", "another address", "our own mark", "a device that is none", "congestion control",
        "a queue that is longer", "a queue that is shorter", "no queues", "endless extras", "an unknown option",
        "nesting", "no entry", "a listener"]


@pytest.mark.parametrize("lie", LIES)
def test_a_state_that_cannot_be(door: Door, lie: str) -> None:
    staged = door.stage()
    assert isinstance(staged, Staged), staged
    door.wire.send(door.prepare(staged.nonce, states(door)[lie]))
    answer = door.hear()
    assert isinstance(answer, Aborted), answer
    door.is_as_before()


def test_a_state_that_was_made_for_another_pass(door: Door) -> None:
    for changes in ({"nonce": "0" * 32}, {"nonce": ""}, {"nonce": "\u00e4"}, {"pass_id": "0" * 16}):
        staged = door.stage()
        assert isinstance(staged, Staged), staged
        door.wire.send(door.prepare(staged.nonce, **changes))
        door.is_as_before()


OUT_OF_TURN = {
    "commit": lambda door, nonce: messages.Commit(door.pass_id, 5),
    "activate": lambda door, nonce: messages.Activate(door.pass_id, 5, *vars(door.image()).values(), b""),
    "prepared": lambda door, nonce: Prepared(door.pass_id),
    "active": lambda door, nonce: messages.Active(door.pass_id, [], [], []),
    "hello": lambda door, nonce: messages.Hello(messages.PROTOCOL, "x", "x", "x", []),
    "try": lambda door, nonce: messages.Try(""),
    "settled": lambda door, nonce: messages.Settled(door.pass_id),
    "another pass": lambda door, nonce: messages.Abort("0" * 16, "x"),
    "another stage": lambda door, nonce: Stage("0" * 16, door.flow.to_json(), door.into, "auto", b"", 500)}
ONCE_PREPARED = {
    **{name: say for name, say in OUT_OF_TURN.items() if name != "commit"},
    "a second state": lambda door, nonce: door.prepare(nonce),
    "imminent": lambda door, nonce: messages.Imminent(door.pass_id),
    "a time before": lambda door, nonce: messages.Commit(door.pass_id, -1),
    "a time without end": lambda door, nonce: messages.Commit(door.pass_id, 1 << 40),
    "commit of another": lambda door, nonce: messages.Commit("0" * 16, 5)}


@pytest.mark.parametrize("word", OUT_OF_TURN)
def test_out_of_turn_before_the_state(door: Door, word: str) -> None:
    staged = door.stage()
    assert isinstance(staged, Staged), staged
    door.wire.send(OUT_OF_TURN[word](door, staged.nonce))
    door.is_as_before()


@pytest.mark.parametrize("word", ONCE_PREPARED)
def test_out_of_turn_behind_the_state(door: Door, word: str) -> None:
    staged = door.stage()
    assert isinstance(staged, Staged), staged
    door.wire.send(door.prepare(staged.nonce))
    assert door.hear() == Prepared(door.pass_id)
    door.wire.send(ONCE_PREPARED[word](door, staged.nonce))
    assert isinstance(door.hear(), Aborted)
    door.is_as_before()
