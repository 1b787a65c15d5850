"""The state's own arithmetic (the drawing in state.py), and what it refuses to be."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from criu_tcpcp.core import tcp
from criu_tcpcp.core.endpoint import Endpoint
from criu_tcpcp.core.state import ConnectionState, Negotiated, Window
from criu_tcpcp.core.tcp import TcpState
from states import plain, states


@given(states())
def test_the_identities_of_the_drawing(state: ConnectionState) -> None:
    fin = int(state.tcp_state is TcpState.CLOSE_WAIT)
    assert tcp.distance(state.rcv_nxt, state.copied_seq) == len(state.received) + fin
    assert tcp.distance(state.write_seq, state.snd_una) == len(state.outgoing)
    assert tcp.distance(state.write_seq, state.snd_nxt) == state.unsent == len(state.unsent_bytes)
    assert tcp.distance(state.snd_nxt, state.snd_una) == len(state.sent)
    assert state.sent + state.unsent_bytes == state.outgoing
    assert state.owes_ack == (state.window.rcv_wup != state.rcv_nxt)


def test_the_identities_across_the_wrap() -> None:
    state = plain(rcv_nxt=2, write_seq=4, window=Window(1, 100, 100, 100, 2))
    assert (state.copied_seq, state.snd_una, state.snd_nxt) == (0xFFFFFFFD, 0xFFFFFFFA, 1)


@given(states())
def test_payload_is_never_shown(state: ConnectionState) -> None:
    secret = replace(state, received=b"SECRETin" * 2, outgoing=b"SECRETout" * 2, unsent=3,
                     window=replace(state.window, rcv_wup=state.rcv_nxt))
    assert "SECRET" not in repr(secret)
    assert "SECRET" not in str(secret)


@pytest.mark.parametrize(("changes", "reason"), [
    *(({"tcp_state": one}, "cannot be passed") for one in TcpState if one not in tcp.PASSABLE_STATES),
    ({"unsent": 11}, "unsent"), ({"unsent": -1}, "unsent"),
    ({"rcv_nxt": 1 << 32}, "outside"), ({"rcv_nxt": -1}, "outside"), ({"write_seq": 1 << 32}, "outside"),
    ({"timestamp": 1 << 32}, "outside"), ({"ts_recent": -1}, "outside"),
    ({"timestamp": None}, "timestamps"), ({"ts_recent": None}, "timestamps"),
    ({"timestamp": None, "ts_recent": None}, "timestamps"),
    ({"negotiated": Negotiated(1460, True, 7, 8, True, False)}, "timestamps"),
    ({"negotiated": Negotiated(0, True, 7, 8, True, True)}, "MSS"),
    ({"negotiated": Negotiated(47, True, 7, 8, True, True)}, "MSS"),
    ({"negotiated": Negotiated(65536, True, 7, 8, True, True)}, "MSS"),
    ({"negotiated": Negotiated(1460, True, 15, 8, True, True)}, "scale"),
    ({"negotiated": Negotiated(1460, True, 7, 15, True, True)}, "scale"),
    ({"negotiated": Negotiated(1460, True, -1, 8, True, True)}, "scale"),
    ({"window": Window(999, 1, 1, 65160, 1001)}, "rcv_wup"),
    ({"window": Window(1000 + 65161, 1, 1, 65160, 1000)}, "snd_wl1"),
    ({"window": Window(999, 1 << 32, 1, 65160, 1000)}, "outside"),
    ({"window": Window(999, 1, 1, -1, 1000)}, "outside"),
])
def test_what_cannot_be_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plain(**changes)


def test_scales_that_were_not_negotiated_are_none() -> None:
    """With no window scaling agreed upon, both shifts are 0 (RFC 7323 2.2): anything else is a lie."""
    with pytest.raises(ValueError, match="scale"):
        plain(negotiated=Negotiated(1460, False, 7, 8, True, True))


@pytest.mark.parametrize("text", ["10.0.0.1:80", "[fd00::1]:65535"])
def test_an_endpoint_is_what_its_text_says(text: str) -> None:
    endpoint = Endpoint.parse(text)
    assert str(endpoint) == text
    assert endpoint.address == ipaddress.ip_address(text.rpartition(":")[0].strip("[]"))


@pytest.mark.parametrize("text", ["", ":80", "10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "fd00::1:80",
                                  "host:80", "[10.0.0.1]:80", "[fd00::1:80", "[::ffff:10.0.0.1]:80", "10.0.0.1:-1"])
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(ValueError):
        Endpoint.parse(text)
