"""One connection is passed there and back, again and again, under seeded streams: every wire assertion and every byte
is judged over its whole life, and afterwards nothing is left.

What differs: the traffic (a request at a time, bursts, queues that are full both ways, hardly a word), the family
(IPv4, IPv6, IPv4 through a v4-mapped socket), and what the handshake settled (timestamps, SACK, window scaling, each
refused by the peer or by the servers). The load stays below what the lab loses by itself: what is sent again is judged.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import pytest

from attempt import exchange
from criu_tcpcp.lab.streams import Stream
from waiting import until
from world import PORT, Peer, World, world

pytestmark = pytest.mark.root

TIMES = 34  # of each variant, together 200
TRAFFIC = {
    "requests": ("rr-peer", "--rate", "100"),
    "bursts": ("burst-peer", "--size", "1000", "--burst", "10", "--pause", "0.1"),
    "full": ("burst-peer", "--size", "1000", "--read-rate", "200000"),
}
#: Queues that fill soon, and windows that no burst of the lab's is lost from.
SMALL_BUFFERS = {"tcp_rmem": "4096 65536 65536", "tcp_wmem": "4096 65536 65536"}
NO = {"timestamps": "tcp_timestamps", "sack": "tcp_sack", "scaling": "tcp_window_scaling"}


@dataclass(frozen=True)
class Variant:
    """`without`: what the handshake does not settle, since the hosts at `refused_by` do not want it."""

    traffic: str
    ip: str
    without: tuple[str, ...] = ()
    refused_by: str = "peer"

    def __str__(self) -> str:
        return "-".join([self.traffic, self.ip, *(f"no-{name}" for name in self.without)])

    @property
    def version(self) -> int:
        return 6 if self.ip == "v6" else 4

    def prepare(self, here: World) -> None:
        servers = (here.lab.origin, here.lab.destination)
        for host in (here.lab.peer, *servers) if self.traffic == "full" else ():
            set_sysctls(host, SMALL_BUFFERS)
        for host in (here.lab.peer,) if self.refused_by == "peer" else servers:
            set_sysctls(host, {NO[name]: "0" for name in self.without})

    def listen(self) -> str:
        return "0.0.0.0" if self.ip == "v4" else "::"


def set_sysctls(host: Any, values: dict[str, str]) -> None:
    for name, value in values.items():
        host.run(["sysctl", "-qw", f"net.ipv4.{name}={value}"])


VARIANTS = [
    Variant("requests", "v4"),
    Variant("full", "v6"),
    Variant("bursts", "v4-mapped", ("timestamps",)),
    Variant("bursts", "v6", ("sack", "scaling"), "servers"),
    Variant("full", "v4", ("timestamps", "sack", "scaling")),
]
LONG = [Variant("full", "v4"), Variant("bursts", "v6")]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("variant", "times"), [
    *(pytest.param(one, TIMES, id=f"{one}-{TIMES}") for one in VARIANTS),
    *(pytest.param(one, 200, id=f"{one}-200", marks=pytest.mark.long) for one in LONG)])
def test_there_and_back_under_load(variant: Variant, times: int) -> None:
    sizes = ("--size", "1000") if variant.traffic != "requests" else ()
    with world("rr", version=variant.version, listen=variant.listen(), whole=True, node_options=sizes) as here:
        variant.prepare(here)
        before = here.counters()
        peer = Peer(here, *TRAFFIC[variant.traffic], "--until-eof")
        for _ in range(times):
            if variant.traffic == "full":
                until(lambda: min(here.queued()) > 10_000, "both queues of the connection to fill", every_s=0.02)
            here.pass_once("--max-stall", "5000", attempts=3)
        report = peer.finish()
        assert report["error"] is None
        assert report["answers"] == report["requests"] > 0
        assert report.get("sha256_received") == report.get("sha256_expected")
        assert here.node.wait_for("end")["error"] is None
        verdict = here.prove(before, application=report)
        assert verdict.negotiated.timestamps == ("timestamps" not in variant.without)
        assert verdict.negotiated.sack == ("sack" not in variant.without)
        assert (verdict.negotiated.window_scale == 0) == ("scaling" in variant.without)
        assert here.release() == []


@pytest.mark.timeout(900)
def test_there_and_back_while_hardly_a_word_is_said() -> None:
    """By a program that knows nothing of it. Most owners never say a word, nor hear one."""
    stream = Stream(7)
    with world("echo", version=6, listen="::", register=False, whole=True) as here:
        before = here.counters()
        with here.lab.peer.enter(), socket.create_connection((str(here.lab.origin.ipv6), PORT), timeout=20) as peer:
            here.knows_peer(peer.getsockname()[1])
            for number in range(TIMES):
                if number % 5 == 0:
                    exchange(peer, stream.read(100 * number, 500))
                here.pass_once("--max-stall", "5000", attempts=3)
            exchange(peer, stream.read(100 * TIMES, 500))
        # It ended each time that it lost the connection.
        assert here.node.wait_for("end", here.node.count("serving"))["error"] is None
        here.prove(before, changes=False)
        assert here.release() == []
