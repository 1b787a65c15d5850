"""The peer that is not there says all of its text to a server with little room, and acknowledges all answers."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_tcpcp.core import tcp
from criu_tcpcp.core.endpoint import Endpoint, Flow
from criu_tcpcp.graft import prologue
from criu_tcpcp.graft.prologue import Silence, Speaker
from criu_tcpcp.kernel.rawpacket import ACK, FIN, PSH, Segment

FLOW = Flow(Endpoint(ipaddress.ip_address("192.0.2.1"), 80), Endpoint(ipaddress.ip_address("192.0.2.2"), 40000))


class Server:
    """A server's end: takes what is next and fits, sends back what it reads, and sends again what is not
    acknowledged when asked to. It stands for the injector as well as for the interception."""

    def __init__(self, ours: int, theirs: int, room: int) -> None:
        self.next, self.una, self.room = ours, theirs, room
        self.read, self.unacknowledged, self.refuses = b"", b"", False
        self._out = [Segment(theirs, self.next, ACK, room, 0)]

    def deliver_bare(self, _flow: Flow, flags: int, sequence: int, acknowledgement: int, payload: bytes = b"") -> None:
        assert flags & ACK
        newly = tcp.distance(acknowledgement, self.una)
        assert 0 <= newly <= len(self.unacknowledged)
        self.una, self.unacknowledged = acknowledgement, self.unacknowledged[newly:]
        assert len(payload) <= self.room
        if payload and sequence == self.next and not self.refuses:
            assert flags & PSH
            self.next, self.read = tcp.add(self.next, len(payload)), self.read + payload
            begin = tcp.add(self.una, len(self.unacknowledged))
            self.unacknowledged += payload
            self._out.append(Segment(begin, self.next, ACK, self.room, len(payload)))

    def taken(self) -> list[Segment]:
        found, self._out = self._out, []
        return found

    def ends(self) -> None:
        self._out.append(Segment(self.una, self.next, ACK | FIN, self.room, 0))

    def close(self) -> None:
        pass


def talk(ours: int, theirs: int, room: int = 1000) -> tuple[Speaker, Server]:
    server: Any = Server(ours, theirs, room)
    return Speaker(FLOW, server, server, ours, theirs), server


@given(st.binary(max_size=20000), st.integers(0, tcp.MODULUS - 1), st.integers(0, tcp.MODULUS - 1),
       st.integers(1024, 65535))
def test_all_is_said_in_order_and_all_answers_are_acknowledged(text: bytes, ours: int, theirs: int, room: int) -> None:
    speaker, server = talk(ours, theirs, room)
    speaker.say(text)
    answered = 0
    for _ in range(40):
        answered += speaker.go_on()
    assert (server.read, answered, server.unacknowledged) == (text, len(text), b"")
    assert speaker.has_said_all
    assert speaker.next_sequence == tcp.add(ours, len(text))


def test_what_the_server_had_no_room_for_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(prologue.time, "monotonic", lambda: now[0])
    speaker, server = talk(1, 1)
    server.refuses = True
    speaker.say(b"hello")
    speaker.go_on()
    server.refuses = False
    speaker.go_on()
    assert server.read == b""
    now[0] += 0.3
    assert speaker.go_on() == 0
    assert speaker.go_on() == 5
    assert speaker.has_said_all


def test_the_servers_end_is_noted() -> None:
    speaker, server = talk(1, 1)
    server.ends()
    speaker.go_on()
    assert speaker.has_closed


def test_a_server_that_says_nothing_is_given_a_second() -> None:
    silence = Silence(10.0)
    assert not silence.is_over(11.0)
    silence.broken(10.5, by_word=False)
    assert not silence.is_over(11.5)
    assert silence.is_over(11.51)


@pytest.mark.parametrize(("took", "wanted"), [(0.001, 0.05), (0.2, 0.4), (3.0, 1.0)])
def test_a_server_that_was_slow_is_given_twice_that_time(took: float, wanted: float) -> None:
    silence = Silence(10.0)
    silence.broken(10.0 + took, by_word=True)
    silence.broken(20.0, by_word=False)
    assert not silence.is_over(19.99 + wanted)
    assert silence.is_over(20.01 + wanted)
    silence.broken(20.001, by_word=True)  # quick for once
    assert not silence.is_over(19.99 + wanted)
