"""Who listens, and an answer that is caught before it leaves."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import closing

import pytest

from criu_tcpcp.core.endpoint import Endpoint, Flow
from criu_tcpcp.kernel import sockdiag
from criu_tcpcp.kernel.interception import Interception
from criu_tcpcp.kernel.nfqueue import PacketQueue
from criu_tcpcp.kernel.rawpacket import ACK, RST, SYN, Injector
from criu_tcpcp.kernel.rules import MARK
from criu_tcpcp.lab import Lab
from waiting import until

pytestmark = pytest.mark.root


def test_listeners_and_what_waits_for_them(lab: Lab) -> None:
    host = lab.destination
    with host.enter(), socket.create_server((str(host.ipv4), 9001), backlog=0), \
            socket.create_server(("::", 9002), family=socket.AF_INET6, dualstack_ipv6=True), \
            socket.create_server(("::", 9003), family=socket.AF_INET6):
        found = {one.port: one for one in sockdiag.listeners() if 9000 < one.port < 9100}
        assert {port: str(one) for port, one in found.items()} == {
            9001: f"{host.ipv4}:9001", 9002: "[::]:9002", 9003: "[::]:9003"}
        assert [[found[port].takes(4), found[port].takes(6)] for port in (9001, 9002, 9003)] == [
            [True, False], [True, True], [False, True]]
        assert not found[9001].is_full
        with socket.create_connection((str(host.ipv4), 9001)):
            until(lambda: next(one for one in sockdiag.listeners() if one.port == 9001).is_full, "a full backlog")


@pytest.fixture(params=[4, 6])
def flow(request: pytest.FixtureRequest, lab: Lab) -> Flow:
    version = request.param
    return Flow(Endpoint(ipaddress.ip_address(str(lab.destination.address(version))), 9000),
                Endpoint(ipaddress.ip_address(str(lab.peer.address(version))), 45678))


@pytest.mark.parametrize("listens", [True, False])
def test_the_answer_to_a_forged_syn_is_seen_and_goes_nowhere(lab: Lab, flow: Flow, listens: bool) -> None:
    family = socket.AF_INET if flow.ip_version == 4 else socket.AF_INET6
    with lab.peer.enter(), closing(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))) as tap:
        tap.setblocking(False)
        with lab.destination.enter(), \
                socket.create_server((str(flow.local.address), 9000 if listens else 9001), family=family) as listener, \
                closing(Injector(flow.ip_version, MARK)) as injector, closing(Interception(flow)) as caught:
            injector.deliver_bare(flow, SYN, 1000)
            answer = caught.answer(2)
            assert answer is not None
            flags, sequence = answer
            assert flags == (SYN | ACK if listens else RST | ACK)
            if listens:
                injector.deliver_bare(flow, ACK, 1001, (sequence + 1) % (1 << 32))
                accepted, address = listener.accept()
                assert address[:2] == (str(flow.peer.address), flow.peer.port)
                entry = sockdiag.entry_of(flow)
                assert entry is not None
                assert entry.inode
                injector.deliver_bare(flow, RST, 1001)
                until(lambda: sockdiag.state_of(flow) is None, "the reset to arrive")
                accepted.close()
        packed = flow.peer.address.packed
        while True:
            try:
                assert packed not in tap.recv(2048)
            except BlockingIOError:
                break


def test_a_packet_that_nobody_sends_is_not_waited_for_longer(lab: Lab) -> None:
    with lab.destination.enter(), closing(PacketQueue()) as packets:
        assert packets.next_packet(0.01) is None
