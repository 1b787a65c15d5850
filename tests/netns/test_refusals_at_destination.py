"""Each refusal that a destination finds while staging, by its name; nothing is left."""

from __future__ import annotations

import ipaddress
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from criu_tcpcp import journal
from criu_tcpcp.core.endpoint import Endpoint, Flow
from criu_tcpcp.core.errors import Refused
from criu_tcpcp.core.messages import Stage
from criu_tcpcp.core.refusals import Refusal
from criu_tcpcp.destination import Destination
from criu_tcpcp.kernel import tcpinfo
from criu_tcpcp.transport.wire import Wire
from endpoints import private_loopback

pytestmark = pytest.mark.root

LOCAL = {4: "192.0.2.1", 6: "2001:db8::1"}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A host of its own without a way to anywhere, and its run directory."""
    monkeypatch.setenv("CRIU_TCPCP_RUN_DIR", str(tmp_path / "run"))
    journal.prepare_run_directory()
    with private_loopback():
        subprocess.run(["ip", "address", "add", LOCAL[4], "dev", "lo"], check=True)
        yield


def connection_of(version: int, peer: str) -> Flow:
    return Flow(Endpoint(ipaddress.ip_address(LOCAL[version]), 9000), Endpoint(ipaddress.ip_address(peer), 40000))


def refused_as(flow: Flow, refusal: Refusal, words: str) -> None:
    reading, writing = socket.socketpair()
    with reading, writing, pytest.raises(Refused, match=words) as caught:
        Destination.staged(Stage(journal.new_id(), flow.to_json(), "receiver", "forward", b"", 500, False, b""),
                           Wire(reading.fileno(), writing.fileno()))
    assert caught.value.refusal == refusal
    assert journal.all_journals() == []
    assert subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout == ""


@pytest.mark.parametrize(("version", "peer"), [(4, "198.51.100.7"), (6, "2001:db8:1::7")])
def test_a_peer_to_which_no_route_leads(version: int, peer: str) -> None:
    refused_as(connection_of(version, peer), Refusal.NO_ROUTE, "no route to the peer")


@pytest.mark.parametrize(("version", "peer"), [(4, "169.254.3.3"), (6, "fe80::3")])
def test_a_peer_of_another_hosts_link(version: int, peer: str) -> None:
    refused_as(connection_of(version, peer), Refusal.LINK_LOCAL, "its own link only")


def test_a_peer_that_is_the_destination_itself() -> None:
    refused_as(connection_of(4, LOCAL[4]), Refusal.LOCAL_PEER, "the destination host itself")


def test_a_connection_that_it_has_already() -> None:
    with socket.create_server((LOCAL[4], 0)) as listener, socket.create_connection(listener.getsockname()) as peer:
        accepted, _ = listener.accept()
        with accepted:
            flow = tcpinfo.flow_of(accepted)
            # Its other end, as one whose peer is elsewhere: only the first of two obstacles is told.
            subprocess.run(["ip", "address", "del", LOCAL[4], "dev", "lo"], check=True)
            subprocess.run(["ip", "route", "add", LOCAL[4], "dev", "lo"], check=True)
            refused_as(flow, Refusal.IN_USE, "already")
            assert peer.fileno() != -1
