"""Passes of a connection in whose stream a segment is missing: what came behind it is not carried, and the peer sends
it again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from attempt import Attempt, conversation, exchange
from criu_tcpcp.kernel import repair, tcpinfo
from criu_tcpcp.lab.streams import Stream
from losing import losing
from waiting import until
from world import World

pytestmark = pytest.mark.root

BURST = 20_000


def deaf_from(here: World, sequence: int) -> AbstractContextManager[Callable[[], None]]:
    """The origin hears no segment that begins there. Yields what ends it early."""
    assert here.flow is not None
    return losing(here.lab.origin, "prerouting", -400, f"tcp sport {here.flow.peer.port} tcp sequence {sequence}")


@pytest.mark.parametrize("when", ["now", "idle:5000"])
def test_what_came_behind_a_lost_segment_is_sent_again(when: str) -> None:
    """At once, the peer takes what it was told by SACK for forgotten (reneging), and sends it again after some 10 ms.
    With a little patience the segment is here, and nothing was forgotten."""
    with conversation(register=False) as (here, peer):
        exchange(peer, b"before")
        before = here.counters()
        with here.lab.peer.enter():
            until(lambda: not tcpinfo.unacknowledged_bytes(peer), "the acknowledgement")
            _rcv_nxt, sequence = repair.sequences(peer)
        data = Stream(3).read(0, BURST)
        attempt = Attempt(here, "origin:stop", "--when", when)
        with deaf_from(here, sequence) as end:
            peer.sendall(data)
            until(lambda: "sacked:" in here.lab.peer.run(["ss", "-tin"]).stdout, "the peer to be told of a gap")
            end()  # the peer sends it again when its timer rings, 200 ms after the last time
            attempt.go_on()
            report = attempt.outcome()
        assert report is not None
        assert report["owner"] == "destination", report
        here.owner = here.lab.destination
        got = bytearray()
        while len(got) < BURST:
            more = peer.recv(BURST)
            assert more
            got += more
        assert bytes(got) == data
        exchange(peer, b"after")
        reneged = here.counters()["TcpExtTCPSACKReneging"] - before["TcpExtTCPSACKReneging"]
        assert reneged == (when == "now")
