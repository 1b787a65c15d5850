"""A connected UDP socket is passed over real SSH, there and back, and its peer misses nothing."""

from __future__ import annotations

import pytest

from datagrams import DatagramPeer, datagram_world

pytestmark = pytest.mark.root

CLEAN: dict[str, object] = {"lost": [], "doubled": [], "overtaken": [], "changed": 0, "error": None}


@pytest.mark.parametrize(("version", "listen"), [(4, "0.0.0.0"), (4, "::"), (6, "::")], ids=["v4", "v4-mapped", "v6"])
def test_numbered_datagrams_go_on_there_and_back_none_lost_doubled_or_overtaken(version: int, listen: str) -> None:
    with datagram_world(version=version, listen=listen) as here:
        peer = DatagramPeer(here, "--rate", "500")
        for _ in range(4):
            report = here.pass_once()
            assert report["connection"].startswith("udp ")
            assert report["left"] == []
        said = peer.finish()
        assert {name: said[name] for name in CLEAN} == CLEAN, said
        assert said["answered"] == said["sent"] > 100
        here.node.end()  # the kernel ends nothing: nobody says goodbye in UDP
        assert here.release() == []
