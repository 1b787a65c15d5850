"""UDP below the sides: what the rules do with its packets, what the kernel tells of its sockets, and what is made by
hand for them."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
from collections.abc import Iterator

import pytest

from criu_tcpcp import endpoints
from criu_tcpcp.core import datagramimage
from criu_tcpcp.core.datagram import LONGEST, DatagramState
from criu_tcpcp.core.endpoint import Flow
from criu_tcpcp.core.errors import Refused
from criu_tcpcp.core.tcp import TcpState
from criu_tcpcp.holding import end_in_order
from criu_tcpcp.kernel import datagrams, netns, sockdiag, sockopt
from criu_tcpcp.kernel.nfqueue import ACCEPT, PacketQueue
from criu_tcpcp.kernel.rawpacket import Injector
from criu_tcpcp.kernel.rules import MARK, Hold, host_rules
from criu_tcpcp.obstacles import inside_datagrams
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


# -- reading ----------------------------------------------------------------------------------------------------------

def read(sock: socket.socket) -> DatagramState:
    return datagrams.read_state(sock, sockopt.read_all(sock), True)


def payloads(state: DatagramState) -> list[bytes]:
    return [one.payload for one in state.datagrams]


def mixed(kind: str) -> list[bytes]:
    longest = LONGEST[6 if kind == "v6" else 4]
    return [b"", b"one", b"", b"two" * 300, b"", b"", bytes(range(256)) * 4, b"x" * (longest - 1), b"y" * longest,
            b"end", b""]


def make_room(*socks: socket.socket) -> None:
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 22)  # SO_RCVBUFFORCE
        sock.setsockopt(socket.SOL_SOCKET, 32, 1 << 22)  # SO_SNDBUFFORCE


@pytest.mark.parametrize("kind", KINDS)
def test_the_queue_is_read_with_its_boundaries_and_stays_as_it_is(kind: str) -> None:
    moving, peer, _flow = pair(kind)
    make_room(moving, peer)
    peer.setsockopt(*((socket.IPPROTO_IPV6, 67) if kind == "v6" else (socket.IPPROTO_IP, socket.IP_TOS)), 0x28)
    peer.setsockopt(*((socket.IPPROTO_IPV6, 16) if kind == "v6" else (socket.IPPROTO_IP, socket.IP_TTL)), 37)
    moving.setsockopt(socket.SOL_SOCKET, 42, 5)  # the program's own SO_PEEK_OFF
    before = sockopt.read_all(moving)
    for payload in mixed(kind):
        peer.send(payload)
    state = read(moving)
    assert payloads(state) == mixed(kind)
    assert {(one.hops, one.traffic_class) for one in state.datagrams} == {(37, 0x28)}
    assert sockopt.read_all(moving) == before
    assert queued(moving) == mixed(kind)
    moving.close()
    peer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_of_empty_datagrams_that_were_looked_at_only_one_at_the_head_is_seen_again(kind: str) -> None:
    """What docs/limits.md says: the kernel passes over them."""
    moving, peer, _flow = pair(kind)
    for payload in (b"", b"one", b"", b"two"):
        peer.send(payload)
    assert payloads(read(moving)) == [b"", b"one", b"", b"two"]
    assert payloads(read(moving)) == [b"", b"one", b"two"]
    assert queued(moving) == [b"", b"one", b"", b"two"]
    moving.close()
    peer.close()


def test_what_the_kernel_has_put_together_is_read_as_it_was_sent() -> None:
    moving, peer, _flow = pair("v4")
    moving.setsockopt(socket.IPPROTO_UDP, 104, 1)  # UDP_GRO
    peer.setsockopt(socket.IPPROTO_UDP, 103, 100)  # UDP_SEGMENT
    peer.send(b"a" * 100 + b"b" * 100 + b"c" * 30)
    assert payloads(read(moving)) == [b"a" * 100, b"b" * 100, b"c" * 30]
    moving.close()
    peer.close()


def test_a_datagram_that_was_begun_and_an_error_that_waits_are_seen() -> None:
    moving, peer, _flow = pair("v4")
    assert inside_datagrams(moving) is None
    moving.send(b"begun", socket.MSG_MORE)
    assert "MSG_MORE" in str(inside_datagrams(moving))
    moving.send(b"finished")
    assert inside_datagrams(moving) is None
    assert queued(peer) == [b"begunfinished"]
    moving.setsockopt(socket.IPPROTO_UDP, 1, 1)  # UDP_CORK
    assert inside_datagrams(moving) is None, "nothing was begun yet"
    moving.send(b"begun")
    assert "UDP_CORK" in str(inside_datagrams(moving))
    moving.setsockopt(socket.IPPROTO_UDP, 1, 0)
    peer.close()
    moving.send(b"to nobody")
    assert "error" in str(inside_datagrams(moving))
    with pytest.raises(Refused, match="error"):
        read(moving)
    with pytest.raises(ConnectionRefusedError):
        moving.recv(1)
    assert inside_datagrams(moving) is None
    moving.close()


# -- restoring --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_socket_has_the_queue_and_the_options_and_goes_on(kind: str) -> None:
    moving, peer, flow = pair(kind)
    make_room(moving, peer)
    for payload in mixed(kind):
        peer.send(payload)
    moving.setsockopt(socket.SOL_SOCKET, 8, 3000)  # SO_RCVBUF: less than what waits
    moving.setsockopt(*((socket.IPPROTO_IPV6, 67) if kind == "v6" else (socket.IPPROTO_IP, socket.IP_TOS)), 0x10)
    moving.setsockopt(socket.IPPROTO_UDP, 103, 1000)
    sockopt.write(moving, "SO_ATTACH_FILTER", "06000000ffffffff")  # takes everything
    state = read(moving)
    options = sockopt.read_all(moving)
    assert payloads(state) == mixed(kind)
    image = datagramimage.encode(state)
    assert datagramimage.decode(image) == state
    injector = Injector(flow.ip_version, MARK)
    endpoint = endpoints.of(flow.protocol)
    endpoint.end(moving, flow, "reset")
    restored = socket.socket(flow.socket_family, socket.SOCK_DGRAM)
    with host_rules(flow.ip_version, flow.protocol) as rules:
        rules.fence(flow)
        restoration = endpoint.restoration(image, lambda: injector, False)
        restoration.restore(restored, sockopt.read_all(restored))
        assert Flow.of_socket(restored) == flow
        assert endpoint.is_dormant(restored)
        peer.send(b"too early")
        restoration.open(restored, 0)
        assert not endpoint.is_dormant(restored)
        rules.unfence(flow)
    peer.send(b"over-full")
    restoration.activate(restored)
    restoration.activate(restored)
    assert restoration.notes == []
    restored.setblocking(False)
    assert {name: value for name, value in sockopt.read_all(restored).items() if value != options[name]} == {}
    again = read(restored)
    assert [(one.hops, one.traffic_class) for one in again.datagrams] \
        == [(one.hops, one.traffic_class) for one in state.datagrams]
    assert queued(restored) == payloads(state), "what came while the buffer was over-full was dropped, as ever"
    peer.send(b"after")
    until(lambda: is_readable(restored), "it arrives")
    assert queued(restored) == [b"after"]
    restored.send(b"answer")
    assert queued(peer) == [b"answer"]
    for part in (moving, restored, peer, injector):
        part.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dormant_socket_takes_no_datagram_of_other_clients_of_its_port(kind: str) -> None:
    moving, peer, flow = pair(kind)
    peer.send(b"waits")
    state = read(moving)
    moving.close()
    server = socket.socket(flow.socket_family, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("", flow.local.port))
    server.setblocking(False)
    injector = Injector(flow.ip_version, MARK)
    restored = socket.socket(flow.socket_family, socket.SOCK_DGRAM)
    restoration = endpoints.of(flow.protocol).restoration(datagramimage.encode(state), lambda: injector, False)
    restoration.restore(restored, {})
    with socket.socket(peer.family, socket.SOCK_DGRAM) as client:
        client.sendto(b"for the server", (str(flow.local.address), flow.local.port))
    assert queued(server) == [b"for the server"]
    restoration.open(restored, 0)
    restoration.activate(restored)
    restored.setblocking(False)
    assert queued(restored) == [b"waits"]
    for part in (server, restored, peer, injector):
        part.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_old_endpoint_ends_deaf_and_dumb_and_its_program_learns_it_as_from_a_closed_port(kind: str) -> None:
    moving, peer, flow = pair(kind)
    peer.send(b"is the destination's now")
    endpoints.of(flow.protocol).end(moving, flow, "reset")
    with pytest.raises(ConnectionRefusedError):
        moving.recv(100)
    assert queued(moving) == []
    with pytest.raises(BrokenPipeError):
        moving.send(b"to nobody")
    assert not is_readable(moving)
    peer.send(b"nobody has it")
    with pytest.raises(ConnectionRefusedError):
        queued(peer)
    assert queued(moving) == queued(peer) == []
    assert sockdiag.entry_of(flow) is None
    home = socket.socket(flow.socket_family, socket.SOCK_DGRAM)
    home.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    home.bind(moving.getsockname())
    for part in (home, moving, peer):
        part.close()
