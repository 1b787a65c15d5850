"""The main job, over real SSH between real hosts: one connection is passed, and its peer cannot tell."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from criu_tcpcp.lab.streams import Stream
from waiting import until
from world import PORT, Peer, world

pytestmark = pytest.mark.root

STREAM_BYTES = 24 << 20
NOBODY = 65534


@pytest.mark.parametrize("listen", ["0.0.0.0", "::"], ids=["v4", "v4-mapped"])
def test_an_unregistered_program_is_passed_at_a_quiet_instant(listen: str) -> None:
    with world("echo", listen=listen, register=False) as here:
        before = here.counters()
        with here.lab.peer.enter(), socket.create_connection((str(here.lab.origin.ipv4), PORT), timeout=20) as peer:
            here.knows_peer(peer.getsockname()[1])
            for number in range(4):
                message = b"%08d" % number * 16
                peer.sendall(message)
                assert peer.recv(4096) == message
                assert here.pass_once()["owner"] == "destination"
            peer.sendall(b"the last")
            assert peer.recv(4096) == b"the last"
        here.node.wait_for("end")
        here.prove(before)
        assert here.release() == []


def test_streams_with_full_queues_arrive_whole_and_the_application_state_with_them() -> None:
    """24 MB each way, both readers slower than the writers. Unpaced streams lose packets by themselves, so what is
    retransmitted is not judged; all that was said is."""
    slow = ("--read-rate", str(5 << 19))
    amounts = ("--send", str(STREAM_BYTES), "--receive", str(STREAM_BYTES))
    with world("stream", node_options=(*amounts, *slow)) as here:
        peer = Peer(here, "stream-peer", *amounts, *slow)
        until(lambda: min(here.queued()) > 50_000, "both queues of the connection to fill", every_s=0.02)
        here.pass_once("--max-stall", "5000")
        report = peer.result()
        assert report["error"] is None
        assert report["bytes_sent"] == report["bytes_received"] == STREAM_BYTES
        assert report["sha256_received"] == Stream(2).sha256(STREAM_BYTES)
        assert here.node.wait_for("end")["error"] is None
        here.prove(loss_free=False)
        assert here.release() == []


def test_a_connection_that_the_peer_has_half_closed_is_passed() -> None:
    with world("stream", node_options=("--send", str(8 << 20), "--receive", "1000", "--rate", str(1 << 20))) as here:
        before = here.counters()
        peer = Peer(here, "stream-peer", "--send", "1000", "--receive", str(8 << 20))
        until(lambda: "CLOSE-WAIT" in here.listed(), "the peer's FIN to arrive")
        here.pass_once()
        assert "CLOSE-WAIT" in here.listed()
        report = peer.result()
        assert report["error"] is None
        assert report["bytes_received"] == 8 << 20
        assert here.node.wait_for("end")["error"] is None
        here.prove(before)
        assert here.release() == []


def test_a_receiver_is_named_by_its_path_and_needs_no_privilege(tmp_path: Path) -> None:
    for directory in tmp_path.parents:
        if str(directory).startswith("/tmp/"):
            directory.chmod(directory.stat().st_mode | 0o011)
    tmp_path.chmod(0o777)
    path = tmp_path / "receiver"
    with world("echo", register=False,
               destination_options=("--receiver-path", str(path), "--user", str(NOBODY))) as here:
        with here.lab.peer.enter(), socket.create_connection((str(here.lab.origin.ipv4), PORT), timeout=20) as peer:
            here.knows_peer(peer.getsockname()[1])
            peer.sendall(b"before")
            assert peer.recv(100) == b"before"
            report = here.pass_once("--into", f"receiver:{path}")
            assert str(path) in report["into"]
            peer.sendall(b"after")
            assert peer.recv(100) == b"after"
        here.node.wait_for("end")
        here.prove()
        assert here.release() == []


def test_an_operator_hands_the_application_state_over_for_a_program_that_cannot(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.write_bytes(b"what the echo owes")
    with world("echo", register=False) as here:
        with here.lab.peer.enter(), socket.create_connection((str(here.lab.origin.ipv4), PORT), timeout=20) as peer:
            here.knows_peer(peer.getsockname()[1])
            here.pass_once("--app-state", str(state))
            assert peer.recv(100) == b"what the echo owes"
        here.node.wait_for("end")
        here.prove()
        assert here.release() == []
