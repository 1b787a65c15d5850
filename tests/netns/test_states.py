"""Every state that an endpoint can be in, with every kind of queue: what is read and re-created is the same connection,
the peer gets every byte and both ends, and nothing that the peer sees contradicts what it saw before."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cells import STATES, Cell, Play, S, blob, came_alive, matches, pairwise, play, product
from criu_tcpcp.core.errors import TcpcpError
from criu_tcpcp.core.image import decode, encode
from criu_tcpcp.kernel import tcpinfo
from criu_tcpcp.lab.strict.judge import Violation
from endpoints import FAMILIES, private_loopback
from matrix import CELLS, OUTCOME, PASSED
from strict_cells import StrictPlay
from waiting import until

pytestmark = pytest.mark.root

PEERS = {"kernel": Play, "strict": StrictPlay}
#: The strict peer does not know ECN.
ALL = {"kernel": list(product(ecn=(False, True))), "strict": list(product())}
FEW = {name: pairwise(cells) for name, cells in ALL.items()}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with private_loopback():
        yield


@pytest.mark.parametrize(("peer", "cell"), [pytest.param(peer, cell, id=f"{peer}: {cell}")
                                            for peer, cells in FEW.items() for cell in cells])
def test_a_cell_of_the_matrix(peer: str, cell: Cell, record_property: Callable[[str, object], None]) -> None:
    """Any two values of what makes a cell meet in one of these."""
    record_property(CELLS, 1)
    record_property(OUTCOME, [play(cell, PEERS[peer]) or PASSED])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("state", STATES, ids=lambda one: one.label)
@pytest.mark.parametrize("peer", PEERS)
def test_every_cell_of_the_matrix(peer: str, state: S, family: str,
                                  record_property: Callable[[str, object], None]) -> None:
    cells = [cell for cell in ALL[peer] if (cell.state, cell.family) == (state, family)]
    record_property(CELLS, len(cells))
    outcomes, wrong = [], []
    for cell in cells:
        try:
            with private_loopback():
                outcomes.append(play(cell, PEERS[peer]) or PASSED)
        except (AssertionError, OSError, TcpcpError, Violation) as error:
            wrong.append(f"{cell}: {type(error).__name__}: {error}")
    record_property(OUTCOME, outcomes)
    assert not wrong, "\n".join(wrong[:20])


def plain(state: S, received: str = "some", outgoing: str = "empty") -> Cell:
    return Cell(state, received, outgoing, timestamps=True, sack=True, scaling=True, ecn=False, family="v4")


@pytest.mark.parametrize("state", [one for one in STATES if one not in (S.CLOSE_WAIT, S.CLOSING, S.LAST_ACK)],
                         ids=lambda one: one.label)
def test_a_program_that_has_shut_down_for_reading_reads_the_end_there_too(state: S) -> None:
    cell = plain(state)
    this = Play(cell)
    try:
        this.arrange()
        this.moving.shutdown(socket.SHUT_RD)
        read = this.read()
        matches(cell, read, this)
        assert read.shut_read
        this.move(read)
        came_alive(cell, read, this.moving)
        assert tcpinfo.reads_end(this.moving)
        assert this.moving.recv(10_000) == this.to_us
        assert this.moving.recv(1) == b""
    finally:
        this.close()


@pytest.mark.parametrize("state", STATES, ids=lambda one: one.label)
@pytest.mark.parametrize("outgoing", ["empty", "in flight", "unsent"])
def test_after_a_reading_that_came_to_nothing_the_old_endpoint_goes_on(state: S, outgoing: str) -> None:
    cell = plain(state, outgoing=outgoing)
    if not cell.can_be:
        return
    this = Play(cell)
    try:
        this.arrange()
        first = this.read()
        this.resume()
        second = this.read()
        this.resume()
        assert (first.rcv_nxt, first.write_seq, first.tcp_state) == (second.rcv_nxt, second.write_seq, state)
        this.finish()
        this.judge()
    finally:
        this.close()


LARGE = 20 << 20


@pytest.mark.parametrize("state", [S.ESTABLISHED, S.FIN_WAIT1], ids=lambda one: one.label)
def test_queues_of_twenty_megabytes_both_ways(state: S) -> None:
    for name in ("tcp_rmem", "tcp_wmem"):
        Path(f"/proc/sys/net/ipv4/{name}").write_text(f"4096 131072 {LARGE * 4}")
    this = Play(plain(state, "empty"))
    try:
        moving, peer = this.moving, this.peer
        for sock in (moving, peer):
            for number in (32, 33):  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
                sock.setsockopt(socket.SOL_SOCKET, number, LARGE * 2)
        peer.sendall(blob(LARGE))
        this.to_us = blob(LARGE)
        until(lambda: tcpinfo.unread_bytes(moving) == LARGE, "they arrive")
        this.wall.deafen()
        moving.sendall(blob(LARGE))
        this.to_peer = blob(LARGE)
        if state is S.FIN_WAIT1:
            moving.shutdown(socket.SHUT_WR)
        read = this.read()
        assert (len(read.received), len(read.outgoing)) == (LARGE, LARGE)
        this.move(decode(encode(read)))
        came_alive(this.cell, read, this.moving)
        this.finish()
        this.judge()
    finally:
        this.close()
