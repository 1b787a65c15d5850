"""The main job, over real SSH between real hosts: one connection is passed, and its peer cannot tell."""

from __future__ import annotations

import socket

import pytest

from world import PORT, Peer, world

pytestmark = pytest.mark.root

TIMES = 20


@pytest.mark.timeout(180)
@pytest.mark.parametrize("version", [4, 6])
def test_a_request_response_peer_survives_twenty_passes_there_and_twenty_back(version: int) -> None:
    with world("rr", version=version) as here:
        before = here.counters()
        peer = Peer(here, "rr-peer", "--rate", "1000", "--until-eof")
        for _ in range(2 * TIMES):
            here.pass_once()
        report = peer.finish()
        assert report["error"] is None
        assert report["answers"] == report["requests"] > 1000
        here.node.wait_for("end")
        verdict = here.verdict(before)
        assert verdict.violations == (), "\n".join(map(str, verdict.violations[:20]))
        assert here.release() == []


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
        verdict = here.verdict(before)
        assert verdict.violations == (), "\n".join(map(str, verdict.violations[:20]))
        assert here.release() == []
