"""A real pass in every state in which both sides have the connection, with every kind of queue; the program at the
destination goes on where the origin's was, and the peer cannot tell."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cells import SYSCTLS, Cell, S, blob, closed
from criu_tcpcp.core.endpoint import Flow
from criu_tcpcp.kernel import tcpinfo
from puppet import Puppet, argv
from waiting import until
from world import PORT, World, world

pytestmark = pytest.mark.root

LISTEN = {"v4": "0.0.0.0", "v6": "::", "mapped": "::"}
BIG = 4_000_000


def cell(state: S, received: str, outgoing: str, family: str, *, timestamps: bool = True, sack: bool = True,
         scaling: bool = True) -> Cell:
    return Cell(state, received, outgoing, timestamps, sack, scaling, False, family)


#: Each state with each kind of queue that it can have.
CELLS = [
    cell(S.ESTABLISHED, "full", "zero window", "v4"),
    cell(S.ESTABLISHED, "some", "corked", "mapped", timestamps=False),
    cell(S.CLOSE_WAIT, "some", "unsent", "v6", sack=False),
    cell(S.CLOSE_WAIT, "full", "zero window", "mapped", scaling=False),
    cell(S.FIN_WAIT1, "empty", "empty", "v4"),
    cell(S.FIN_WAIT1, "some", "in flight", "v6", timestamps=False),
    cell(S.FIN_WAIT1, "full", "unsent", "mapped"),
    cell(S.FIN_WAIT1, "some", "zero window", "v4", sack=False),
    cell(S.FIN_WAIT2, "empty", "empty", "v6", timestamps=False),
    cell(S.FIN_WAIT2, "full", "empty", "v4"),
    cell(S.CLOSING, "empty", "empty", "mapped"),
    cell(S.CLOSING, "some", "in flight", "v4", scaling=False),
    cell(S.CLOSING, "full", "unsent", "v6", timestamps=False),
    cell(S.LAST_ACK, "empty", "empty", "v6"),
    cell(S.LAST_ACK, "some", "in flight", "mapped", timestamps=False, sack=False, scaling=False),
    cell(S.LAST_ACK, "full", "zero window", "v4"),
]


@contextlib.contextmanager
def deaf(here: World, flow: Flow) -> Iterator[None]:
    """What comes for the peer is lost on its last step, behind the capture."""
    rule = f"tcp sport {flow.local.port} tcp dport {flow.peer.port} drop"
    here.lab.peer.run(["nft", "-f", "-"], input=f"""table inet deaf {{
        chain input {{ type filter hook input priority 0; {rule}; }}
    }}""")
    try:
        yield
    finally:
        here.lab.peer.run(["nft", "delete", "table", "inet", "deaf"])


class Scene:
    """One cell between three hosts. `orders`: of the program that has the connection."""

    def __init__(self, here: World, cell: Cell, peer: socket.socket, orders: Puppet) -> None:
        self.here, self.cell, self.peer, self.orders = here, cell, peer, orders
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

    def finish(self, orders: Puppet) -> None:
        """Every byte reaches its program, and both ends close."""
        cell, peer = self.cell, self.peer
        assert orders("receive", self.to_us) == [self.to_us, True]
        if cell.fin_received:
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
        if not cell.fin_received:
            peer.shutdown(socket.SHUT_WR)
            assert orders("receive", 1) == [0, True]
        until(lambda: tcpinfo.read(peer).state is S.CLOSE, "the peer's end to close")
        until(lambda: self.state() in ("", "TIME-WAIT"), "the passed end to close", every_s=0.02)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_connection_is_passed_in_every_state(cell: Cell, tmp_path: Path) -> None:
    programs = {"origin": argv(tmp_path / "origin", "accept", LISTEN[cell.family], str(PORT)),
                "destination": argv(tmp_path / "destination", "receive", str(PORT))}
    with world(version=cell.ip_version, programs=programs, waiting=False) as here:
        for host in (here.lab.peer, here.lab.origin, here.lab.destination):
            for name, file in SYSCTLS.items():
                host.run(["sysctl", "-qw", f"net.ipv4.{file}={int(getattr(cell, name))}"])
        for node in here.nodes.values():
            node.wait_for("listening")
        with here.lab.peer.enter(), socket.create_connection(
                (str(here.lab.origin.address(here.version)), PORT), timeout=20) as peer:
            here.knows_peer(peer.getsockname()[1])
            with contextlib.closing(Puppet(tmp_path / "origin")) as orders:
                scene = Scene(here, cell, peer, orders)
                passed_over(scene)
                with contextlib.closing(Puppet(tmp_path / "destination")) as others:
                    scene.finish(others)
        here.prove(loss_free=False, changes=False)


def passed_over(scene: Scene) -> None:
    cell = scene.cell
    scene.greet()
    scene.fill()
    if cell.fin_received and cell.state is not S.CLOSING:
        scene.peer.shutdown(socket.SHUT_WR)
        scene.reaches(S.CLOSE_WAIT)
    if cell.state is S.FIN_WAIT2:
        assert scene.orders("shutdown", socket.SHUT_WR) == 0
        scene.reaches(S.FIN_WAIT2)
    with deaf(scene.here, scene.flow):
        scene.arrange()
        report = scene.here.pass_once("--max-stall", "5000")
        assert report["owner"] == "destination"


