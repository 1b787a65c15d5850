"""The state of a UDP socket, its image, its plan, and the order of packets that come by two ways."""

from __future__ import annotations

from dataclasses import replace

import pytest

from criu_tcpcp.core import datagramimage, image
from criu_tcpcp.core.datagram import LONGEST, Datagram, DatagramState, fitted
from criu_tcpcp.core.datagramplan import Deafen, Deliver, Hear, activation_steps, dormant_steps, opening_steps
from criu_tcpcp.core.endpoint import Flow, Protocol
from criu_tcpcp.core.errors import ProtocolError
from criu_tcpcp.core.reorder import WayOrder
from criu_tcpcp.core.restoreplan import Bind, Connect, SetOption
from states import FLOWS, datagram_states, plain


def test_a_flow_says_its_protocol_and_tcp_is_not_said() -> None:
    flow = replace(FLOWS["v4"], protocol=Protocol.UDP)
    assert Flow.from_json(flow.to_json()) == flow
    assert flow.to_json()["protocol"] == "udp"
    assert set(FLOWS["v4"].to_json()) == {"local", "peer", "mapped", "scope_id"}
    assert str(flow) == f"udp {FLOWS['v4']}"
    for wrong in ("tcp", "sctp", 17, None):
        with pytest.raises(ProtocolError):
            Flow.from_json({**flow.to_json(), "protocol": wrong})


@pytest.mark.parametrize("state", datagram_states(), ids=lambda state: f"v{state.flow.ip_version}")
def test_a_state_comes_back_from_its_image(state: DatagramState) -> None:
    made = datagramimage.encode(state, 77)
    assert datagramimage.decode(made) == state
    with pytest.raises(ProtocolError, match=r"not TCP|wrong magic|cut short"):
        image.decode(made)


def test_an_image_of_tcp_is_none_of_udp() -> None:
    with pytest.raises(ProtocolError):
        datagramimage.decode(image.encode(plain()))


@pytest.mark.parametrize("wrong", [
    {"flow": FLOWS["v4"]}, {"datagrams": (Datagram(b"x" * (LONGEST[4] + 1)),)},
    {"datagrams": (Datagram(b""),) * 65537}],
    ids=["tcp", "too long", "too many"])
def test_a_state_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"not UDP|more than"):
        replace(datagram_states()[0], **wrong)


@pytest.mark.parametrize("wrong", [{"hops": 0}, {"hops": 256}, {"traffic_class": 256}, {"traffic_class": -1}])
def test_a_datagram_that_cannot_have_come_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"hops|class"):
        Datagram(b"", **wrong)


def test_a_dormant_socket_is_deaf_but_for_the_datagrams_that_waited() -> None:
    state = datagram_states()[0]
    steps = dormant_steps(state)
    kinds = [type(step) for step in steps if not isinstance(step, SetOption)]
    assert kinds.index(Deafen) < kinds.index(Bind) < kinds.index(Connect) < kinds.index(Hear) < kinds.index(Deliver)
    assert kinds[-1] is Deafen
    assert [step.datagram for step in steps if isinstance(step, Deliver)] == list(state.datagrams)
    assert opening_steps(state) == [Hear()]
    filtered = replace(state, options={**state.options, "SO_ATTACH_FILTER": "06000000ffffffff"})
    assert opening_steps(filtered) == [Hear(), SetOption("SO_ATTACH_FILTER", "06000000ffffffff")]
    assert all(isinstance(step, SetOption) for step in activation_steps(state))
    assert "x" * 10 not in repr(steps)


def test_the_device_is_set_behind_the_datagrams_which_do_not_come_by_it() -> None:
    state = datagram_states()[0]
    steps = dormant_steps(replace(state, options={**state.options, "SO_BINDTODEVICE": "eth0"}))
    kinds = [step.name if isinstance(step, SetOption) else type(step) for step in steps]
    assert max(place for place, kind in enumerate(kinds) if kind is Deliver) < kinds.index("SO_BINDTODEVICE")


def test_a_socket_that_a_program_has_keeps_its_own_options() -> None:
    state = fitted(datagram_states()[0], {"SO_RCVBUF": 1 << 20, "UDP_SEGMENT": 500}, ipv6_socket=True)
    assert (state.options["SO_RCVBUF"], state.options["UDP_SEGMENT"], state.flow.mapped) == (1 << 20, 500, True)


def test_what_came_by_the_old_owner_goes_before_what_came_directly() -> None:
    order = WayOrder(lambda packet: packet[0])
    assert order.came(1, b"\x40") == []
    assert order.came(2, b"\x3f") == [2]
    assert order.came(3, b"\x40") == []
    assert order.came(4, b"\x3f") == [4]
    assert order.waits
    assert order.give_up() == [1, 3]
    assert not order.waits


def test_as_long_as_all_have_gone_as_far_they_wait_for_what_may_have_gone_less() -> None:
    order = WayOrder(lambda packet: packet[0])
    assert order.came(1, b"\x3f") == order.came(2, b"\x3f") == []
    assert order.came(3, b"\x40") == [1, 2]
    assert order.give_up() == [3]
