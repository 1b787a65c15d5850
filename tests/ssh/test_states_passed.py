"""A real pass in every state in which both sides have the connection, with every kind of queue; the program at the
destination goes on where the origin's was, and the peer cannot tell."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from attempt import Attempt
from cells import SYSCTLS, Cell, S, blob, closed
from criu_tcpcp.core import tcp
from criu_tcpcp.core.endpoint import Flow
from criu_tcpcp.kernel import repair, tcpinfo
from criu_tcpcp.kernel.rawpacket import Injector
from criu_tcpcp.kernel.rules import MARK
from losing import losing
from puppet import Puppet, argv
from waiting import until
from world import PORT, World, world

pytestmark = pytest.mark.root

LISTEN = {"v4": "0.0.0.0", "v6": "::", "mapped": "::"}
BIG = 4_000_000


def cell(state: S, received: str, outgoing: str, family: str, *, timestamps: bool = True, sack: bool = True,
         scaling: bool = True) -> Cell:
    return Cell(state, received, outgoing, timestamps, sack, scaling, False, family)


#: Each state in the ordinary run, and each kind of queue that it can have.
CELLS = [
    cell(S.CLOSE_WAIT, "some", "unsent", "v6", sack=False),
    cell(S.FIN_WAIT1, "some", "in flight", "v6", timestamps=False),
    cell(S.FIN_WAIT1, "full", "unsent", "mapped"),
    cell(S.FIN_WAIT2, "full", "empty", "v4"),
    cell(S.CLOSING, "some", "in flight", "v4", scaling=False),
    cell(S.LAST_ACK, "full", "zero window", "v4"),
]
LONG = [
    cell(S.ESTABLISHED, "full", "zero window", "v4"),
    cell(S.ESTABLISHED, "some", "corked", "mapped", timestamps=False),
    cell(S.CLOSE_WAIT, "full", "zero window", "mapped", scaling=False),
    cell(S.FIN_WAIT1, "empty", "empty", "v4"),
    cell(S.FIN_WAIT1, "some", "zero window", "v4", sack=False),
    cell(S.FIN_WAIT2, "empty", "empty", "v6", timestamps=False),
    cell(S.CLOSING, "empty", "empty", "mapped"),
    cell(S.CLOSING, "full", "unsent", "v6", timestamps=False),
    cell(S.LAST_ACK, "empty", "empty", "v6"),
    cell(S.LAST_ACK, "some", "in flight", "mapped", timestamps=False, sack=False, scaling=False),
]


def deaf(here: World, flow: Flow) -> AbstractContextManager[Callable[[], None]]:
    """What comes for the peer is lost on its last step, behind the capture. Yields what ends it early."""
    return losing(here.lab.peer, "input", 0, f"tcp sport {flow.local.port} tcp dport {flow.peer.port}")


def dumb(here: World, flow: Flow) -> AbstractContextManager[Callable[[], None]]:
    """What the peer says is lost on its first step. Yields what ends it early."""
    return losing(here.lab.peer, "output", 0, f"tcp sport {flow.peer.port} tcp dport {flow.local.port}")


class Scene:
    """One cell between three hosts. `orders`: of the program that has the connection."""

    def __init__(self, here: World, cell: Cell, peer: socket.socket, orders: Puppet) -> None:
        self.here, self.cell, self.peer, self.orders = here, cell, peer, orders
        self.ended = cell.fin_received  # by the peer
        self.to_us = self.to_peer = 0  # bytes that either program still has to read
        peer.settimeout(20)
        assert here.flow is not None
        self.flow = here.flow

    def state(self) -> str:
        """Of the passed end, by ss."""
        home = self.here.homes[self.here.owner.name]
        found = home.run(["ss", "-tanH", "sport", "=", str(PORT), "dport", "=", str(self.flow.peer.port)]).stdout
        return found.split()[0] if found else ""

    def reaches(self, state: S) -> None:
        until(lambda: self.state() == state.label, f"{state.label}, not {self.state()}", every_s=0.01)

    def greet(self) -> None:
        self.peer.sendall(blob(8))
        assert self.orders("receive", 8) == [8, True]
        assert self.orders("send", 8) == 0
        assert self.receive(8) == blob(8)

    def receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size and (more := self.peer.recv(size - len(data))):
            data += more
        return bytes(data)

    def fill(self) -> None:
        """What is in the queues before either end closes."""
        cell, peer = self.cell, self.peer
        assert self.orders("send_buffer", BIG if cell.outgoing == "zero window" else 1 << 18) == 0
        if cell.received != "empty":
            size = 5000 if cell.received == "some" else 50_000 if cell.fin_received else BIG
            peer.setsockopt(socket.SOL_SOCKET, 32, size)  # SO_SNDBUFFORCE
            peer.setblocking(False)
            self.to_us = peer.send(blob(size))
            peer.settimeout(20)
            until(lambda: closed(peer) if size == BIG else not tcpinfo.unacknowledged_bytes(peer), "the bytes")
        if cell.outgoing == "zero window":
            self.send(BIG)
            until(lambda: tcpinfo.unread_bytes(peer) and self.window_is_closed(), "the peer's window to close",
                  every_s=0.02)

    def send(self, size: int) -> None:
        assert self.orders("send", size) == 0
        self.to_peer += size

    def window_is_closed(self) -> bool:
        """By the peer's own numbers: nothing more arrives."""
        before = tcpinfo.unread_bytes(self.peer)
        self.here.lab.peer.run(["true"])
        return before == tcpinfo.unread_bytes(self.peer)

    def arrange(self) -> None:
        """With the peer deaf."""
        cell, orders = self.cell, self.orders
        sizes = {"in flight": 3000, "unsent": 100_000, "corked": 100}
        if cell.outgoing == "corked":
            assert orders("cork", 1) == 0
        if cell.outgoing in sizes:
            self.send(sizes[cell.outgoing])
        if cell.state in (S.FIN_WAIT1, S.CLOSING, S.LAST_ACK):
            assert orders("shutdown", socket.SHUT_WR) == 0
        if cell.state is S.CLOSING:
            self.reaches(S.FIN_WAIT1)
            self.peer.shutdown(socket.SHUT_WR)
        self.reaches(cell.state)

    def prepare(self) -> None:
        """With a peer that hears."""
        cell = self.cell
        self.greet()
        self.fill()
        if cell.state in (S.CLOSE_WAIT, S.LAST_ACK):
            self.peer.shutdown(socket.SHUT_WR)
            self.reaches(S.CLOSE_WAIT)
        if cell.state is S.FIN_WAIT2:
            assert self.orders("shutdown", socket.SHUT_WR) == 0
            self.reaches(S.FIN_WAIT2)

    def acknowledge(self) -> None:
        """The peer says once more what it has: to a keep-alive that is made there, since the origin is silent."""
        back = Flow(self.flow.peer, self.flow.local)
        with self.here.lab.peer.enter(), contextlib.closing(Injector(back.ip_version, MARK)) as injector:
            rcv_wup, snd_una = repair.window_edges(self.peer)
            injector.deliver_old(back, tcp.add(rcv_wup, -1), snd_una, b"")

    def end_by_the_peer(self) -> None:
        """In one segment: of two, the last one is repeated after some milliseconds (a tail-loss probe). A FIN that
        comes twice is acknowledged twice, the second time to a peer that is no more, which answers by RST."""
        self.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        self.peer.sendall(blob(self.to_us + 1000)[self.to_us:])
        self.to_us += 1000
        self.peer.shutdown(socket.SHUT_WR)
        self.ended = True

    def finish(self, orders: Puppet) -> None:
        """Every byte reaches its program, and both ends close."""
        cell, peer = self.cell, self.peer
        assert orders("receive", self.to_us) == [self.to_us, True]
        if self.ended:
            assert orders("receive", 1) == [0, True]
        else:
            peer.sendall(blob(4000))
            assert orders("receive", 4000) == [4000, True]
        sent = blob(self.to_peer)
        if cell.fin_queued:
            assert orders("send", 4) == -32  # EPIPE
        else:
            assert orders("send", 8) == 0
            sent += blob(8)
            assert orders("shutdown", socket.SHUT_WR) == 0
        assert self.receive(len(sent) + 1) == sent
        if not self.ended:
            peer.shutdown(socket.SHUT_WR)
            assert orders("receive", 1) == [0, True]
        until(lambda: tcpinfo.read(peer).state is S.CLOSE, "the peer's end to close")
        until(lambda: self.state() in ("", "TIME-WAIT"), "the passed end to close", every_s=0.02)


@contextlib.contextmanager
def scene_of(cell: Cell, tmp_path: Path, sysctls: dict[str, str] | None = None, *,
             takes: str = "receive") -> Iterator[Scene]:
    """A puppet at either host, and a connection to the origin's. `takes`: as what the destination's takes one."""
    address = [LISTEN[cell.family]]
    programs = {"origin": argv(tmp_path / "origin", "accept", *address, str(PORT)),
                "destination": argv(tmp_path / "destination", takes, *(address if takes == "accept" else []),
                                    str(PORT))}
    settings = {file: str(int(getattr(cell, name))) for name, file in SYSCTLS.items()} | (sysctls or {})
    with world(version=cell.ip_version, programs=programs, waiting=False) as here:
        for host in (here.lab.peer, here.lab.origin, here.lab.destination):
            for name, value in settings.items():
                host.run(["sysctl", "-qw", f"net.ipv4.{name}={value}"])
        for node in here.nodes.values():
            node.wait_for("listening")
        with here.lab.peer.enter(), socket.create_connection(
                (str(here.lab.origin.address(here.version)), PORT), timeout=20) as peer:
            here.knows_peer(peer.getsockname()[1])
            with contextlib.closing(Puppet(tmp_path / "origin")) as orders:
                yield Scene(here, cell, peer, orders)


@pytest.mark.parametrize("cell", [*CELLS, *(pytest.param(one, marks=pytest.mark.long) for one in LONG)], ids=str)
def test_a_connection_is_passed_in_every_state(cell: Cell, tmp_path: Path) -> None:
    with scene_of(cell, tmp_path) as scene:
        scene.prepare()
        with deaf(scene.here, scene.flow):
            scene.arrange()
            scene.here.pass_once("--max-stall", "5000")
        with contextlib.closing(Puppet(tmp_path / "destination")) as others:
            scene.finish(others)
        scene.here.prove(loss_free=False, changes=False)


#: What the state is, and what the peer does while its packets are held.
MEANWHILE = [(S.ESTABLISHED, "data and end"), (S.FIN_WAIT1, "acknowledgement"), (S.LAST_ACK, "acknowledgement")]
MEANWHILE_LONG = [(S.CLOSE_WAIT, "acknowledgement"), (S.FIN_WAIT1, "data and end"), (S.FIN_WAIT2, "data and end")]


@pytest.mark.parametrize(("state", "meanwhile"), [
    *(pytest.param(*one, id=f"{one[0].label} {one[1]}") for one in MEANWHILE),
    *(pytest.param(*one, id=f"{one[0].label} {one[1]}", marks=pytest.mark.long) for one in MEANWHILE_LONG)])
def test_what_the_peer_ends_while_it_is_held_ends_at_the_destination(state: S, meanwhile: str, tmp_path: Path) -> None:
    """Its FIN, or its acknowledgement of ours, which ends the whole connection where it has closed already."""
    with scene_of(cell(state, "some", "empty" if state is S.FIN_WAIT2 else "in flight", "v4"), tmp_path) as scene:
        scene.prepare()
        with dumb(scene.here, scene.flow) as speak:
            scene.arrange()
            attempt = Attempt(scene.here, "origin:fence", "--max-stall", "20000")
            speak()
            if meanwhile == "acknowledgement":
                scene.acknowledge()
            else:
                scene.end_by_the_peer()
            attempt.go_on()
            report = attempt.outcome()
        assert report is not None
        assert report["owner"] == "destination", report
        scene.here.owner = scene.here.lab.destination
        with contextlib.closing(Puppet(tmp_path / "destination")) as others:
            scene.finish(others)
        scene.here.prove(loss_free=False, changes=False, passes=1)


@pytest.mark.parametrize("state", [S.FIN_WAIT1, pytest.param(S.CLOSING, marks=pytest.mark.long)],
                         ids=lambda one: one.label)
def test_what_was_undone_ends_at_the_origin(state: S, tmp_path: Path) -> None:
    with scene_of(cell(state, "some", "unsent", "v4"), tmp_path) as scene:
        scene.prepare()
        with deaf(scene.here, scene.flow):
            scene.arrange()
            report = Attempt(scene.here, "origin:verify", fails_with="EIO").outcome()
            assert report is not None
            assert report["owner"] == "origin", report
            scene.reaches(state)
        scene.finish(scene.orders)
        scene.here.prove(loss_free=False, changes=False, passes=0)


def test_a_server_that_knows_nothing_of_it_gets_a_connection_whose_end_waits(tmp_path: Path) -> None:
    """Through its own accept: it cannot write before the end stands behind what the origin's program wrote."""
    with scene_of(cell(S.FIN_WAIT1, "some", "unsent", "v4"), tmp_path, takes="accept") as scene:
        scene.prepare()
        with deaf(scene.here, scene.flow):
            scene.arrange()
            report = scene.here.pass_once("--max-stall", "5000")
            assert "descriptor" in report["into"]
        with contextlib.closing(Puppet(tmp_path / "destination")) as others:
            scene.finish(others)
        scene.here.prove(loss_free=False, changes=False)


def test_sixteen_megabytes_each_way(tmp_path: Path) -> None:
    large = 16 << 20
    memory = f"4096 131072 {large * 4}"
    plain = cell(S.ESTABLISHED, "empty", "empty", "v4")
    with scene_of(plain, tmp_path, {"tcp_rmem": memory, "tcp_wmem": memory}) as scene:
        assert scene.orders("send_buffer", 2 * large) == scene.orders("receive_buffer", 2 * large) == 0
        scene.peer.setsockopt(socket.SOL_SOCKET, 32, 2 * large)  # SO_SNDBUFFORCE
        scene.greet()
        scene.peer.sendall(blob(large))
        until(lambda: not tcpinfo.unacknowledged_bytes(scene.peer), "they arrive", every_s=0.02)
        scene.to_us = large
        with deaf(scene.here, scene.flow):
            scene.send(large)
            scene.here.pass_once("--max-stall", "20000")
        with contextlib.closing(Puppet(tmp_path / "destination")) as others:
            scene.finish(others)
        scene.here.prove(loss_free=False, changes=False)
