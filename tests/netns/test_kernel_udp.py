"""UDP below the sides: what the rules do with its packets, what the kernel tells of its sockets, and what is made by
hand for them."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
from collections.abc import Iterator

import pytest

from criu_tcpcp.core.endpoint import Flow
from criu_tcpcp.core.tcp import TcpState
from criu_tcpcp.holding import end_in_order
from criu_tcpcp.kernel import netns, sockdiag
from criu_tcpcp.kernel.nfqueue import ACCEPT, PacketQueue
from criu_tcpcp.kernel.rawpacket import Injector
from criu_tcpcp.kernel.rules import MARK, Hold, host_rules
from waiting import until

pytestmark = pytest.mark.root

KINDS = ["v4", "v6", "mapped"]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with netns.private():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        yield


def pair(kind: str) -> tuple[socket.socket, socket.socket, Flow]:
    """(the end that moves, its peer, the flow), connected to each other over loopback."""
    moving = socket.socket(socket.AF_INET if kind == "v4" else socket.AF_INET6, socket.SOCK_DGRAM)
    peer = socket.socket(socket.AF_INET6 if kind == "v6" else socket.AF_INET, socket.SOCK_DGRAM)
    address = {"v4": "127.0.0.1", "v6": "::1", "mapped": "::ffff:127.0.0.1"}[kind]
    plain = address.removeprefix("::ffff:")
    moving.bind((address, 0))
    peer.bind((plain, 0))
    moving.connect((address, peer.getsockname()[1]))
    peer.connect((plain, moving.getsockname()[1]))
    for one in (moving, peer):
        one.setblocking(False)
    return moving, peer, Flow.of_socket(moving)


def queued(sock: socket.socket) -> list[bytes]:
    """What waits at a socket, taken out."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(sock.recv(1 << 16))
    return found


def is_readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_held_datagrams_wait_and_are_released_in_order_and_the_hold_ends_in_order(kind: str) -> None:
    moving, peer, flow = pair(kind)
    queue = PacketQueue()
    hold = Hold(flow.ip_version, queue.number, flow.protocol)
    assert hold.queues
    hold.add(flow)
    injector = Injector(flow.ip_version, MARK)
    for number in range(50):
        peer.send(b"%04d" % number)
    until(lambda: queue.collect() == 50, "they wait")
    assert queued(moving) == []
    injector.knock(flow)
    assert hold.is_held(flow)
    end_in_order(hold, queue, injector, flow, ACCEPT)
    peer.send(b"the last")
    assert not hold.is_held(flow)
    until(lambda: is_readable(moving), "they arrive")
    assert queued(moving) == [*(b"%04d" % number for number in range(50)), b"the last"]
    for part in (hold, queue, injector, moving, peer):
        part.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fenced_udp_connection_neither_hears_nor_speaks_and_other_protocols_do_not_notice(kind: str) -> None:
    moving, peer, flow = pair(kind)
    with host_rules(flow.ip_version, flow.protocol) as rules, host_rules(flow.ip_version) as others:
        rules.fence(flow)
        assert rules.is_fenced(flow)
        assert rules.flows() == {"fenced": [flow.plain]}
        assert not others.is_fenced(flow)
        peer.send(b"unheard")
        with pytest.raises(PermissionError):
            moving.send(b"unsaid")
        assert queued(moving) == queued(peer) == []
        moving.close()
        peer.send(b"unanswered")
        assert queued(peer) == [], "no port unreachable"
        assert rules.unfence(flow)
        assert rules.sweep()
        peer.send(b"answered")
        with pytest.raises(ConnectionRefusedError):
            queued(peer)
    peer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_tells_of_a_connected_udp_socket_and_not_of_one_that_takes_from_anybody(kind: str) -> None:
    moving, peer, flow = pair(kind)
    entry = sockdiag.entry_of(flow)
    assert entry is not None
    assert entry.state is TcpState.ESTABLISHED
    moving.close()
    assert sockdiag.entry_of(flow) is None
    with socket.socket(socket.AF_INET6 if kind == "v6" else socket.AF_INET, socket.SOCK_DGRAM) as anybody:
        anybody.bind(("", flow.local.port))
        assert sockdiag.entry_of(flow) is None
    peer.close()
