"""The state's own arithmetic (the drawing in state.py), and what it refuses to be."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from criu_tcpcp.core import tcp
from criu_tcpcp.core.endpoint import Endpoint, Flow
from criu_tcpcp.core.errors import ProtocolError
from criu_tcpcp.core.state import ConnectionState, Negotiated, Window
from criu_tcpcp.core.tcp import TcpState
from states import plain, states


@given(states())
def test_the_identities_of_the_drawing(state: ConnectionState) -> None:
    fin = int(state.tcp_state in {TcpState.CLOSE_WAIT, TcpState.CLOSING, TcpState.LAST_ACK})
    assert tcp.distance(state.rcv_nxt, state.copied_seq) == len(state.received) + fin
    ours = int(state.tcp_state in {TcpState.FIN_WAIT1, TcpState.CLOSING, TcpState.LAST_ACK})  # not acknowledged
    assert tcp.distance(state.write_seq, state.snd_una) == len(state.outgoing) + ours
    assert tcp.distance(state.write_seq, state.snd_nxt) == state.unsent + state.fin_unsent
    assert state.unsent == len(state.unsent_bytes)
    assert tcp.distance(state.snd_nxt, state.snd_una) == len(state.sent) + ours - state.fin_unsent
    acknowledged = int(state.tcp_state is TcpState.FIN_WAIT2)
    assert tcp.distance(state.snd_una, state.first_outgoing) == acknowledged
    assert state.sent + state.unsent_bytes == state.outgoing
    assert state.owes_ack == (state.window.rcv_wup != state.rcv_nxt)


def test_the_identities_across_the_wrap() -> None:
    state = plain(rcv_nxt=2, write_seq=4, window=Window(1, 100, 100, 100, 2))
    assert (state.copied_seq, state.snd_una, state.snd_nxt) == (0xFFFFFFFD, 0xFFFFFFFA, 1)


@given(states())
def test_payload_is_never_shown(state: ConnectionState) -> None:
    secret = replace(state, received=b"SECRETin" * 2, outgoing=b"SECRETout" * 2, unsent=3, fin_unsent=False,
                     tcp_state=TcpState.CLOSE_WAIT, window=replace(state.window, rcv_wup=state.rcv_nxt))
    assert "SECRET" not in repr(secret)
    assert "SECRET" not in str(secret)


@pytest.mark.parametrize(("changes", "reason"), [
    *(({"tcp_state": one}, "cannot be passed") for one in TcpState if one not in tcp.PASSABLE_STATES),
    ({"unsent": 11}, "unsent"), ({"unsent": -1}, "unsent"),
    ({"rcv_nxt": 1 << 32}, "outside"), ({"rcv_nxt": -1}, "outside"), ({"write_seq": 1 << 32}, "outside"),
    ({"timestamp": 1 << 32}, "outside"), ({"ts_recent": -1}, "outside"),
    ({"tcp_state": TcpState.FIN_WAIT2}, "in front of an acknowledged FIN"),
    ({"tcp_state": TcpState.FIN_WAIT1}, "in front of a sent FIN"),
    ({"fin_unsent": True}, "no FIN is there"), ({"fin_unsent": True, "unsent": 0}, "no FIN is there"),
    ({"tcp_state": TcpState.FIN_WAIT2, "outgoing": b"", "unsent": 0, "fin_unsent": True}, "no FIN is there"),
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


FLOW = {"local": ["192.0.2.1", 80], "peer": ["198.51.100.2", 5], "mapped": False, "scope_id": 0}
FLOW_6 = FLOW | {"local": ["2001:db8::1", 80], "peer": ["fe80::2", 5], "scope_id": 3}


@pytest.mark.parametrize("value", [FLOW, FLOW_6, FLOW | {"mapped": True}])
def test_a_flow_is_what_its_json_says(value: dict[str, Any]) -> None:
    assert Flow.from_json(value).to_json() == value


@pytest.mark.parametrize("value", [
    None, [], "flow", {}, FLOW | {"more": 1}, FLOW | {"mapped": 1}, FLOW_6 | {"mapped": True},
    FLOW | {"scope_id": -1}, FLOW_6 | {"scope_id": 1 << 32}, FLOW_6 | {"scope_id": True}, FLOW_6 | {"scope_id": 1.0},
    FLOW | {"scope_id": 10 ** 400},
    *(FLOW | {"peer": peer} for peer in (
        None, [], "ab", ["198.51.100.2"], ["198.51.100.2", 5, 5], ["198.51.100.2", "5"], ["198.51.100.2", True],
        ["198.51.100.2", 0], ["198.51.100.2", 65536], ["198.51.100.2", -1], ["host", 5], [5, 5], [None, 5], [[], 5],
        ["198.51.100.2/24", 5], ["198.51.100.02", 5], ["\udc80", 5], ["2001:db8::1", 5])),
    *(FLOW_6 | {"peer": [peer, 5]} for peer in ("::ffff:198.51.100.2", "fe80::1%eth0", "2001:db8::1%" + "x" * 10000)),
], ids=lambda value: repr(value)[:60])
def test_what_is_no_flow(value: Any) -> None:
    with pytest.raises(ProtocolError, match="not a flow"):
        Flow.from_json(value)
