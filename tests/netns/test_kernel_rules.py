"""Hold, fence, move, divert and the grace period, on real packets; and what is left when their owner is gone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from criu_tcpcp.core import tcp
from criu_tcpcp.core.endpoint import Flow
from criu_tcpcp.core.errors import KernelError
from criu_tcpcp.core.reorder import SegmentOrder
from criu_tcpcp.core.restoreplan import activation_steps, clock_steps, dormant_steps
from criu_tcpcp.holding import end_in_order
from criu_tcpcp.kernel import netns, repair, routing, sockopt, tcpinfo
from criu_tcpcp.kernel.grace import GracePeriod
from criu_tcpcp.kernel.nfqueue import ACCEPT, PacketQueue
from criu_tcpcp.kernel.rawpacket import Injector, extent
from criu_tcpcp.kernel.rules import MARK, TABLE, Hold, HostRules, host_rules
from criu_tcpcp.kernel.tap import Sniffer
from criu_tcpcp.kernel.timestamps import learn_ts_recent
from criu_tcpcp.lab import Host, Lab, leftovers
from criu_tcpcp.merging import Merging
from waiting import until

pytestmark = pytest.mark.root

VERSIONS = [4, 6]


@pytest.fixture
def alone() -> Iterator[None]:
    with netns.private():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        yield


def pair(version: int) -> tuple[socket.socket, socket.socket, Flow]:
    family, address = (socket.AF_INET, "127.0.0.1") if version == 4 else (socket.AF_INET6, "::1")
    with socket.create_server((address, 0), family=family) as listener:
        peer = socket.create_connection(listener.getsockname()[:2], 10)
        moving, _ = listener.accept()
    for one in (moving, peer):
        one.settimeout(10)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return moving, peer, tcpinfo.flow_of(moving)


def exchange(one: socket.socket, other: socket.socket) -> None:
    for sender, receiver in ((one, other), (other, one)):
        sender.sendall(b"ping")
        assert receiver.recv(4, socket.MSG_WAITALL) == b"ping"


def from_sequence(number: int, version: int) -> SegmentOrder:
    return SegmentOrder(number, lambda packet: extent(packet, version))


def ruleset() -> str:
    return subprocess.run(["nft", "list", "ruleset"], text=True, capture_output=True, check=True).stdout


def out_of_order() -> int:
    """Segments that came to a socket of this namespace ahead of others."""
    said = subprocess.run(["nstat", "-asjz", "TcpExtTCPOFOQueue"], text=True, capture_output=True, check=True).stdout
    return int(json.loads(said)["kernel"]["TcpExtTCPOFOQueue"])


# -- hold -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("version", VERSIONS)
def test_held_packets_wait_and_are_released_in_order(version: int, alone: None) -> None:
    moving, peer, flow = pair(version)
    bystander, other, _flow = pair(version)
    queue = PacketQueue()
    hold = Hold(version, queue.number)
    assert hold.queues
    hold.add(flow)
    for number in range(50):
        peer.sendall(b"%04d" % number)
    until(lambda: queue.collect() >= 1, "they wait")
    exchange(bystander, other)
    assert tcpinfo.unread_bytes(moving) == 0
    while tcpinfo.unread_bytes(moving) < 200:  # those that an acknowledgement lets go come later, and wait as well
        assert queue.collect() >= 0
        queue.release()
    assert moving.recv(200) == b"".join(b"%04d" % number for number in range(50))
    assert hold.remove(flow)
    assert not hold.remove(flow)
    queue.release()
    exchange(moving, peer)
    hold.close()
    queue.close()
    assert TABLE not in ruleset()
    for one in (moving, peer, bystander, other):
        one.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_hold_ends_only_where_nothing_has_arrived_since_one_looked(version: int, alone: None) -> None:
    moving, peer, flow = pair(version)
    queue = PacketQueue()
    hold = Hold(version, queue.number)
    injector = Injector(version, MARK)
    hold.add(flow)
    peer.sendall(b"first")
    injector.knock(flow)
    assert hold.is_held(flow)
    until(lambda: queue.release() >= 1, "it is let go")
    peer.sendall(b"second")
    injector.knock(flow)
    assert hold.is_held(flow), "or the third would overtake the second"
    until(lambda: queue.release() >= 1, "it is let go")
    until(lambda: tcpinfo.read(peer).unacked == 0, "all of it to be acknowledged")
    end_in_order(hold, queue, injector, flow, ACCEPT)
    assert not hold.is_held(flow)
    peer.sendall(b"third")
    until(lambda: tcpinfo.unread_bytes(moving) == 16, "all to arrive")
    assert moving.recv(16) == b"firstsecondthird"
    injector.knock(flow)
    exchange(moving, peer)
    for part in (hold, queue, injector, moving, peer):
        part.close()
    assert ruleset() == ""


@pytest.mark.parametrize("version", VERSIONS)
def test_what_comes_by_two_ways_is_merged_in_order(version: int, alone: None) -> None:
    """The first segment is held on its way: the second arrives before it."""
    patience = Path("/proc/sys/net/ipv4/tcp_rto_min_us")  # Linux 6.11, f086edef71be: else a slow machine sends it again
    if patience.exists():
        patience.write_text("30000000")
    moving, peer, flow = pair(version)
    queue = PacketQueue()
    merging = Merging(flow, missing_s=60, lasts_s=60)
    hold = Hold(version, queue.number)  # of chains with the same priority, the newer comes first
    hold.add(flow)
    peer.sendall(b"first ")
    until(lambda: queue.collect() == 1, "it waits")
    hold.remove(flow)
    merging.begin(from_sequence(repair.sequences(moving)[0], version))
    peer.sendall(b"second ")
    # A tail-loss probe may bring the second once more.
    until(lambda: merging.waiting >= 1, "the second to wait for the first")
    assert tcpinfo.unread_bytes(moving) == 0
    queue.release()
    until(lambda: tcpinfo.unread_bytes(moving) == 13, "both to arrive")
    assert moving.recv(13) == b"first second "
    assert out_of_order() == 0
    merging.close()
    exchange(moving, peer)
    for part in (hold, queue, moving, peer):
        part.close()
    assert ruleset() == ""


@pytest.mark.parametrize("version", VERSIONS)
def test_what_does_not_come_by_the_other_way_is_not_waited_for(version: int, alone: None) -> None:
    moving, peer, flow = pair(version)
    merging = Merging(flow)
    merging.begin(from_sequence(tcp.add(repair.sequences(moving)[0], -1000), version))
    exchange(moving, peer)
    merging.close()
    exchange(moving, peer)
    moving.close()
    peer.close()
    assert ruleset() == ""


HOLDER = """if True:
    import sys
    from criu_tcpcp.core.endpoint import Flow
    import json
    from criu_tcpcp.kernel.nfqueue import PacketQueue
    from criu_tcpcp.kernel.rules import Hold
    queue = PacketQueue()
    hold = Hold(int(sys.argv[1]), queue.number)
    hold.add(Flow.from_json(json.loads(sys.argv[2])))
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_when_the_holder_is_killed_the_packets_flow(version: int, alone: None) -> None:
    moving, peer, flow = pair(version)
    argv = [sys.executable, "-c", HOLDER, str(version), json.dumps(flow.to_json())]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        peer.sendall(b"held back")
        assert f"{TABLE}_hold_{holder.pid}" in ruleset()
        moving.setblocking(False)
        with pytest.raises(BlockingIOError):
            moving.recv(1)
        moving.settimeout(10)
        holder.kill()
    until(lambda: TABLE not in ruleset(), "the table goes with its owner")
    assert moving.recv(9, socket.MSG_WAITALL) == b"held back"
    exchange(moving, peer)
    moving.close()
    peer.close()


def test_an_overflow_does_not_reach_the_old_owner(alone: None) -> None:
    """Nobody reads the queue: what does not fit is dropped, never let by."""
    moving, peer, flow = pair(4)
    peer.setblocking(False)
    queue = PacketQueue()
    hold = Hold(4, queue.number)
    hold.add(flow)
    for _ in range(3000):
        with suppress(BlockingIOError):
            peer.send(b"x" * 100)
    assert tcpinfo.unread_bytes(moving) == 0
    hold.close()
    queue.close()
    moving.close()
    peer.close()


# -- fence ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("version", VERSIONS)
def test_a_fenced_connection_neither_speaks_nor_hears(version: int, alone: None) -> None:
    moving, peer, flow = pair(version)
    bystander, other, _flow = pair(version)
    with host_rules(version) as rules:
        rules.prepare_fence()
        exchange(moving, peer)
        rules.fence(flow)
        assert rules.flows() == {"fenced": [flow]}
        moving.sendall(b"from inside")
        peer.sendall(b"from outside")
        exchange(bystander, other)
        exchange(bystander, other)
        assert tcpinfo.unread_bytes(moving) == 0
        assert tcpinfo.unread_bytes(peer) == 0
        assert not rules.sweep(), "a fence that is needed stays"
        assert rules.flows() == {"fenced": [flow]}
        assert rules.unfence(flow)
        assert not rules.unfence(flow)
        assert moving.recv(12, socket.MSG_WAITALL) == b"from outside"
        assert peer.recv(11, socket.MSG_WAITALL) == b"from inside"
        assert rules.sweep()
    assert ruleset() == ""
    for one in (moving, peer, bystander, other):
        one.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fence_outlives_who_put_it_up_and_draws_no_reset(version: int, alone: None) -> None:
    moving, peer, flow = pair(version)
    with host_rules(version) as rules:
        rules.prepare_fence()
        rules.fence(flow)
    repair.end_silently(moving)
    moving.close()
    peer.sendall(b"to nobody")
    until(lambda: tcpinfo.read(peer).total_retrans > 0, "it tries again")
    peer.sendall(b"and again")  # a RST would have ended it
    with host_rules(version) as rules:
        assert rules.unfence(flow) | rules.stay(flow) | rules.undivert(flow)
        assert not rules.unfence(flow) | rules.stay(flow) | rules.undivert(flow)
        assert rules.sweep()
    peer.close()


def test_sweeping_where_nothing_is(alone: None) -> None:
    with host_rules(4) as rules:
        assert rules.sweep()
        assert rules.flows() == {}
    assert ruleset() == ""


# -- move and divert: between the hosts of a lab ----------------------------------------------------------------------

def connect(lab: Lab, version: int, *, mapped: bool = False) -> tuple[socket.socket, socket.socket, Flow]:
    """A connection of the peer to the origin."""
    address = str(lab.origin.address(version))
    with lab.origin.enter():
        family = socket.AF_INET if version == 4 and not mapped else socket.AF_INET6
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if mapped:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::" if mapped else address, 9000))
        listener.listen()
    with listener:
        with lab.peer.enter():
            peer = socket.create_connection((address, 9000), 10)
        moving, _ = listener.accept()
    moving.settimeout(10)
    return moving, peer, tcpinfo.flow_of(moving)


@contextmanager
def rules_of(host: Host, version: int) -> Iterator[HostRules]:
    with host.enter(), host_rules(version) as rules:
        yield rules


@contextmanager
def heard(host: Host, flow: Flow) -> Iterator[list[bytes]]:
    """The payloads of the flow's incoming segments that reach the host's interface."""
    with host.enter():
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
    tap.settimeout(0.05)
    found: list[bytes] = []
    over = threading.Event()

    def listen() -> None:
        while not over.is_set():
            try:
                data, address = tap.recvfrom(70000)
            except TimeoutError:
                continue
            head = (data[0] & 15) * 4 if data[0] >> 4 == 4 else 40
            ports = (int.from_bytes(data[head:head + 2], "big"), int.from_bytes(data[head + 2:head + 4], "big"))
            if address[2] != 4 and ports == (flow.peer.port, flow.local.port):
                found.append(data[head + (data[head + 12] >> 4) * 4:])

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        tap.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_packets_of_a_fenced_connection_keep_its_fence(version: int, lab: Lab) -> None:
    """One whose fence expired while its peer still spoke would draw a RST from this host."""
    moving, peer, flow = connect(lab, version)
    family = "ip" if version == 4 else "ip6"

    def expires_s() -> int:
        said = json.loads(lab.origin.run(["nft", "-j", "list", "set", family, TABLE, "fenced"]).stdout)
        (element,) = said["nftables"][1]["set"]["elem"]
        return int(element["elem"]["expires"])

    with rules_of(lab.origin, version) as rules:
        rules.prepare_fence()
        rules._table.add("fenced", [flow], 3600)
        assert expires_s() <= 3600
        peer.sendall(b"nobody hears this")
        until(lambda: expires_s() > 3600, "the fence to last longer")
        assert rules.unfence(flow)
        assert rules.sweep()
    moving.close()
    peer.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_moved_connection_is_heard_at_the_next_hop_and_not_here(version: int, lab: Lab) -> None:
    before = leftovers(lab.origin)
    moving, peer, flow = connect(lab, version)
    exchange(moving, peer)
    nexthop = lab.destination.address(version)
    with lab.origin.enter():
        hop = routing.way_to(nexthop)
    with rules_of(lab.origin, version) as rules, heard(lab.destination, flow) as found:
        rules.prepare_move(nexthop, hop.interface)
        exchange(moving, peer)
        assert found == []
        rules.move(flow, nexthop, hop.interface)
        assert rules.is_moved(flow)
        peer.sendall(b"for the new owner")
        until(lambda: b"for the new owner" in found, "it arrives")
        assert tcpinfo.unread_bytes(moving) == 0
        assert rules.stay(flow)
        assert not rules.is_moved(flow)
        assert moving.recv(17, socket.MSG_WAITALL) == b"for the new owner"
        assert rules.sweep()
    moving.close()
    peer.close()
    assert leftovers(lab.origin) == before


@pytest.mark.parametrize("version", VERSIONS)
def test_a_connection_that_ended_while_it_was_moved_leaves_nothing(version: int, lab: Lab) -> None:
    """Its FIN has put it among those that are closing: taking it back takes that away too."""
    moving, peer, flow = connect(lab, version)
    nexthop = lab.destination.address(version)
    with rules_of(lab.origin, version) as rules, heard(lab.destination, flow) as found:
        with lab.origin.enter():
            rules.move(flow, nexthop, routing.way_to(nexthop).interface)
        peer.shutdown(socket.SHUT_WR)
        until(lambda: found, "the FIN arrives")
        assert rules.stay(flow)
        assert rules.sweep()
    moving.close()
    peer.close()


@pytest.mark.parametrize("family", ["v4", "v6", "mapped"])
def test_a_whole_pass_by_hand(family: str, lab: Lab) -> None:
    """Hold, grace, read, fence, restore elsewhere, divert, move: the order of a switch, without any of the protocol."""
    version = 6 if family == "v6" else 4
    before = {host.name: leftovers(host) for host in (lab.origin, lab.destination)}
    moving, peer, flow = connect(lab, version, mapped=family == "mapped")
    exchange(moving, peer)
    moving.settimeout(None)
    with rules_of(lab.origin, version) as at_origin, rules_of(lab.destination, version) as at_destination:
        with lab.origin.enter():
            grace, queue, injector_o, sniffer = GracePeriod(), PacketQueue(), Injector(version, MARK), Sniffer(flow)
            hold = Hold(version, queue.number)
            hop = routing.way_to(lab.destination.address(version))
            at_origin.prepare_fence()
            at_origin.prepare_move(lab.destination.address(version), hop.interface)
        hold.add(flow)
        grace.wait()
        peer.sendall(b"while nobody listens")
        recent = learn_ts_recent(moving, flow, sniffer, injector_o, 0.5)
        state = repair.read_state(moving, sockopt.read_all(moving), False, recent)
        with lab.destination.enter():
            assert not routing.is_local(flow.local.address)
            at_destination.divert(flow)
            routing.add_divert(flow.local.address)
            fresh = socket.socket(flow.socket_family)
            injector_d = Injector(version, MARK)
        restorer = repair.Restorer(fresh, transparent=True, inject=lambda one: injector_d.deliver(flow, one))
        restorer.run(dormant_steps(state))
        at_origin.fence(flow)
        restorer.run([*clock_steps(state, 1), *activation_steps(state)])
        at_origin.move(flow, lab.destination.address(version), hop.interface)
        until(lambda: queue.collect() >= 1, "the held packet")
        queue.release()
        repair.end_silently(moving)
        moving.close()
        assert hold.remove(flow)
        queue.release()
        fresh.settimeout(10)
        assert fresh.recv(20, socket.MSG_WAITALL) == b"while nobody listens"
        exchange(fresh, peer)
        assert tcpinfo.read(peer).total_retrans == 0
        assert at_destination.is_diverted(flow)
        with lab.destination.enter():
            assert at_destination.diverted_addresses() == {flow.local.address}
            routing.add_divert(flow.local.address)  # for a second connection: nothing changes
            # The peer ends it: FIN and RST shorten the rules' life, and nothing answers in the wrong place.
            peer.shutdown(socket.SHUT_WR)
            assert fresh.recv(1) == b""
            fresh.sendall(b"bye")
            assert peer.recv(3, socket.MSG_WAITALL) == b"bye"
            fresh.close()
            assert peer.recv(1) == b""
            assert at_destination.unfence(flow) | at_destination.stay(flow) | at_destination.undivert(flow)
            assert at_destination.sweep()
            routing.sweep_diverts(version, set())
        assert at_origin.unfence(flow) | at_origin.stay(flow) | at_origin.undivert(flow)
        assert at_origin.sweep()
        hold.close()
        queue.close()
        grace.close()
        for one in (injector_o, injector_d, sniffer):
            one.close()
    peer.close()
    assert restorer.reports == []
    assert {host.name: leftovers(host) for host in (lab.origin, lab.destination)} == before


# -- many at once -----------------------------------------------------------------------------------------------------

WORKER = """if True:
    import ipaddress, sys
    from criu_tcpcp.core.endpoint import Endpoint, Flow
    from criu_tcpcp.kernel.rules import host_rules
    address = ipaddress.ip_address(sys.argv[2])
    flow = Flow(Endpoint(address, 9000), Endpoint(address, int(sys.argv[3])))
    print("ready", flush=True)
    sys.stdin.readline()
    with host_rules(int(sys.argv[1])) as rules:
        for _ in range(20):
            rules.prepare_fence()
            rules.fence(flow)
            assert flow in rules.flows()["fenced"], "swept from under us"
            rules.divert(flow)
            assert rules.is_diverted(flow), "swept from under us"
            assert rules.unfence(flow)
            rules.sweep()
            assert rules.is_diverted(flow), "swept from under us"
            assert rules.unfence(flow) | rules.stay(flow) | rules.undivert(flow)
            rules.sweep()
    print("done", flush=True)
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_commands_at_once_do_not_pull_the_rules_from_under_each_other(version: int, alone: None) -> None:
    address = "192.0.2.1" if version == 4 else "2001:db8::1"
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(version), address, str(1000 + number)], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for number in range(4)]
    try:
        for one in workers:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n"
        for one in workers:
            assert one.stdin is not None
            one.stdin.write("go\n")
            one.stdin.flush()
        ends = [one.communicate(timeout=60) for one in workers]
    finally:
        for one in workers:
            one.kill()
            one.communicate()
    assert ends == [("done\n", "")] * 4
    with host_rules(version) as rules:
        assert rules.sweep()
    assert ruleset() == ""


# -- grace ------------------------------------------------------------------------------------------------------------

def test_a_grace_period_can_be_had_again_and_again_and_leaves_nothing(lab: Lab) -> None:
    before = leftovers(lab.origin)
    with lab.origin.enter():
        home = netns.identity("/proc/thread-self/ns/net")
        descriptors = set(os.listdir("/proc/self/fd"))
        for _ in range(2):
            grace = GracePeriod()
            assert netns.identity("/proc/thread-self/ns/net") == home
            for _again in range(3):
                grace.wait()
            grace.close()
            grace.close()
        assert set(os.listdir("/proc/self/fd")) == descriptors
    assert leftovers(lab.origin) == before


def test_a_grace_period_without_tun_still_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_interface(self: GracePeriod) -> None:
        raise KernelError("open /dev/net/tun", 2, "No such file or directory")

    monkeypatch.setattr(GracePeriod, "_make_interface", no_interface)
    grace = GracePeriod()
    assert not grace.fast
    grace.wait()
    grace.close()


def test_nothing_is_left_of_a_queue(alone: None) -> None:
    queue = PacketQueue()
    assert str(queue.number) in Path("/proc/thread-self/net/netfilter/nfnetlink_queue").read_text()
    other = PacketQueue()
    assert other.number != queue.number
    queue.close()
    other.close()
    assert Path("/proc/thread-self/net/netfilter/nfnetlink_queue").read_text() == ""
