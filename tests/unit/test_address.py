"""An address as it travels from host to host."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_tcpcp.core.address import KEPT_FLAGS, InterfaceAddress
from criu_tcpcp.core.errors import ProtocolError

V4 = InterfaceAddress(ipaddress.ip_address("192.0.2.9"), 24, ipaddress.ip_address("192.0.2.255"), 0, ":vip", 0x200, 7)
V6 = InterfaceAddress(ipaddress.ip_address("2001:db8::9"), 64, deprecated=True)


@given(st.sampled_from([V4, V6]), st.integers(1, 32), st.integers(0, 255), st.integers(0, (1 << 32) - 1),
       st.integers(0, KEPT_FLAGS))
def test_what_is_said_is_understood(one: InterfaceAddress, length: int, scope: int, metric: int, flags: int) -> None:
    said = {**one.to_json(), "prefix_length": length, "scope": scope, "metric": metric, "flags": flags & KEPT_FLAGS}
    assert InterfaceAddress.from_json(said).to_json() == said


@pytest.mark.parametrize("change", [
    {"address": "nowhere"}, {"address": "127.0.0.1"}, {"address": "0.0.0.0"}, {"address": "224.0.0.1"},
    {"address": "169.254.0.1"}, {"address": "fe80::1%eth0"}, {"address": "2001:db8::1"}, {"prefix_length": 0},
    {"prefix_length": 33}, {"prefix_length": True}, {"prefix_length": "24"}, {"broadcast": "2001:db8::1"},
    {"scope": 256}, {"scope": -1}, {"flags": 0x80}, {"flags": -1}, {"metric": 1 << 32}, {"label": "vip"},
    {"label": ":a b"}, {"label": ":" + "x" * 15}, {"label": None}, {"deprecated": 1}])
def test_what_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="not an address of an interface"):
        InterfaceAddress.from_json({**V4.to_json(), **change})


@pytest.mark.parametrize("said", [None, [], "192.0.2.9", {}, {"address": "192.0.2.9"}])
def test_nor_is_what_is_not_whole(said: Any) -> None:
    with pytest.raises(ProtocolError):
        InterfaceAddress.from_json(said)


def test_its_network_is_that_of_its_prefix() -> None:
    assert str(V4.network) == "192.0.2.0/24"
    assert str(V6.network) == "2001:db8::/64"
    assert str(V4) == "192.0.2.9/24"
