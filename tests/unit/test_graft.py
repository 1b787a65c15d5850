"""What a graft into a program's own socket takes over, and which ways in there are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_tcpcp import graft
from criu_tcpcp.core.errors import UsageError
from criu_tcpcp.core.options import BUFFERS, BY_NAME, ON_THE_WIRE
from criu_tcpcp.core.state import ConnectionState, fitted
from states import plain, states

WAYS = ["auto", "receiver", "receiver:/run/x", "receiver:a:b", "accept:42", "listen:1", "listen:65535", "pid:42:7",
        "pid:42"]
NO_WAYS = ["", "auto:", "receiver:", "accept", "accept:", "accept:x", "accept:-1", "accept:1:2", "listen:0",
           "listen:65536", "listen:9000:1", "pid", "pid:", "pid:42:", "pid::7", "pid:42:7:1", "pid:\u00b2:1",
           "accept:9999999999"]


@pytest.mark.parametrize("way", WAYS)
def test_these_are_ways_in(way: str) -> None:
    graft.check_name(way)


@pytest.mark.parametrize("way", NO_WAYS)
def test_these_are_none(way: str) -> None:
    with pytest.raises(UsageError, match="not a way in"):
        graft.check_name(way)


@given(states(), states(), st.booleans())
def test_the_programs_socket_keeps_what_is_the_programs(state: ConnectionState, other: ConnectionState,
                                                        ipv6_socket: bool) -> None:
    own = other.options
    made = fitted(state, own, ipv6_socket)
    for name, value in own.items():
        carried = state.options.get(name)
        if name in BUFFERS and isinstance(carried, int) and isinstance(value, int):
            assert made.options[name] == max(value, carried)
        elif name in ON_THE_WIRE and carried is not None:
            assert made.options[name] == carried
        else:
            assert made.options[name] == value
    assert (made.flow.local, made.flow.peer) == (state.flow.local, state.flow.peer)
    assert made.flow.mapped == (ipv6_socket and state.flow.ip_version == 4)
    assert (made.outgoing, made.received, made.window) == (state.outgoing, state.received, state.window)


def test_the_lists_of_options_name_options() -> None:
    assert set(BY_NAME) >= ON_THE_WIRE | BUFFERS
    assert fitted(plain(options={"IP_TTL": 9}), {}, ipv6_socket=False).options == {"IP_TTL": 9}
