"""What `list` says of all sockets at once is what `pass` finds at one of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from criu_tcpcp import inventory
from criu_tcpcp.core.errors import Refused
from criu_tcpcp.core.refusals import Refusal
from criu_tcpcp.core.tcp import TcpState
from criu_tcpcp.inventory import Connection
from criu_tcpcp.kernel import netns, tcpinfo
from criu_tcpcp.lab import Lab
from waiting import until

pytestmark = pytest.mark.root

SO_ZEROCOPY = 60

#: A server that has its connections from one listener for each name, does with them what the name says, and tells
#: [descriptors] of all.
SERVER = f"""if True:
    import json, os, socket, sys
    names, sockets = sys.argv[1:], {{}}
    listeners = {{name: socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) for name in names}}
    print(json.dumps({{name: one.getsockname()[1] for name, one in listeners.items()}}), flush=True)
    for name in names:
        sockets[name] = listeners[name].accept()[0]
        listeners[name].close()
    sockets["zerocopy"].setsockopt(socket.SOL_SOCKET, {SO_ZEROCOPY}, 1)
    copy = os.dup(sockets["dup"].fileno())
    unbound, udp, unix = socket.socket(), socket.socket(type=socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)
    listening = socket.create_server(("0.0.0.0", 0))
    if not (child := os.fork()):
        for name, one in sockets.items():
            if name != "shared":
                one.close()
        for one in (listening, unbound, udp, unix):
            one.close()
        os.close(copy)
    descriptors = {{name: [one.fileno()] for name, one in sockets.items()}}
    descriptors["dup"].append(copy)
    descriptors["listening"] = [listening.fileno()]
    if child:
        sockets["half"].recv(1)
        print(json.dumps({{"pid": os.getpid(), "child": child, "fds": descriptors}}), flush=True)
    sys.stdin.read()
"""
WHY_NOT = {"plain": None, "v6": None, "dup": None, "half": None,
           "shared": (Refusal.SHARED, "is shared with process {child}"),
           "zerocopy": (Refusal.ZEROCOPY, "uses MSG_ZEROCOPY"),
           "urgent": (Refusal.URGENT_DATA, "has urgent data waiting"),
           "ended": None,
           "loopback": (Refusal.LOOPBACK, "is a loopback connection"),
           "itself": (Refusal.LOCAL_PEER, "is on the origin host itself"),
           "listening": (Refusal.LISTENING, "is a listening socket")}


@dataclass
class Server:
    pid: int
    child: int
    descriptors: dict[str, tuple[int, ...]]


@contextmanager
def serving(lab: Lab) -> Iterator[Server]:
    names = [name for name in WHY_NOT if name != "listening"]
    program = lab.origin.spawn([sys.executable, "-c", SERVER, *names], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdout is not None
    ports = json.loads(program.stdout.readline())
    peers = {}
    for name in names:
        host = lab.origin if name in ("loopback", "itself") else lab.peer
        address = {"loopback": "127.0.0.1", "v6": str(lab.origin.ipv6)}.get(name, str(lab.origin.ipv4))
        with host.enter():
            peers[name] = socket.create_connection((address, ports[name]))
    peers["half"].sendall(b"some")
    peers["half"].shutdown(socket.SHUT_WR)
    peers["urgent"].send(b"!", socket.MSG_OOB)
    told = json.loads(program.stdout.readline())
    server = Server(told["pid"], told["child"], {name: tuple(found) for name, found in told["fds"].items()})
    (ended,) = server.descriptors["ended"]
    with borrowed(server.pid, ended) as sock:
        sock.shutdown(socket.SHUT_WR)
        until(lambda: tcpinfo.read(sock).state is TcpState.FIN_WAIT2, "the end to be acknowledged")
    (half,) = server.descriptors["half"]
    with borrowed(server.pid, half) as sock:
        until(lambda: tcpinfo.read(sock).state is TcpState.CLOSE_WAIT, "the peer's end to arrive")
    (urgent,) = server.descriptors["urgent"]
    with borrowed(server.pid, urgent) as sock:
        until(lambda: tcpinfo.has_urgent_data(sock), "urgent data to arrive")
    yield server
    for peer in peers.values():
        peer.close()


def borrowed(pid: int, descriptor: int) -> socket.socket:
    from criu_tcpcp.kernel import syscalls
    pidfd = syscalls.pidfd_open(pid)
    try:
        return syscalls.borrow_socket(pidfd, descriptor)
    finally:
        os.close(pidfd)


def test_every_connection_with_its_descriptors_queues_sharing_and_whether_it_can_be_passed(lab: Lab) -> None:
    with serving(lab) as server:
        listed = {one.descriptors: one for one in inventory.connections(server.pid)}
        assert set(listed) == set(server.descriptors.values())
        for name, descriptors in server.descriptors.items():
            one = listed[descriptors]
            wanted = WHY_NOT[name]
            if wanted is None:
                assert one.obstacle is None, (name, one)
            else:
                refusal, words = wanted
                assert one.obstacle is not None, (name, one)
                assert one.obstacle.refusal == refusal
                assert words.format(child=server.child) in one.obstacle.what, (name, one)
            assert one.shared_with == ((server.child,) if name == "shared" else ()), name
            assert agrees(one, descriptors[-1]), name
        ended = listed[server.descriptors["ended"]]
        assert (ended.state, ended.unread, ended.unacknowledged) == (TcpState.FIN_WAIT2, 0, 0)
        half = listed[server.descriptors["half"]]
        assert (half.state, half.unread, half.unacknowledged) == (TcpState.CLOSE_WAIT, 3, 0)
        everywhere = {(one.pid, one.descriptors): one for one in inventory.connections()}
        assert [everywhere[server.pid, one] for one in listed] == list(listed.values())
        assert {one.inode for one in everywhere.values() if one.pid == server.child} == {
            listed[server.descriptors["shared"]].inode}


def agrees(one: Connection, descriptor: int) -> bool:
    """With what a pass of it finds."""
    try:
        found = inventory.find(one.pid, descriptor)
        with netns.enter(f"/proc/{one.pid}/ns/net"):
            inventory.refuse_local_peer(found)
    except Refused as error:
        obstacle = one.obstacle
        return (obstacle is not None and error.message.endswith(obstacle.what) and error.hint == obstacle.hint
                and error.refusal == obstacle.refusal)
    return found == one
