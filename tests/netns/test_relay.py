"""The relay between the peer and the servers: packets arrive, or not, as the seed says."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from criu_tcpcp.lab import Host, Lab, Weather
from criu_tcpcp.lab.weather import IN, OUT, Fates

pytestmark = pytest.mark.root

COUNT = 300


@contextlib.contextmanager
def receiver(host: Host, version: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    with host.enter(), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 23)  # SO_RCVBUFFORCE
        sock.bind((str(host.address(version)), 7000))
        yield sock


def send(host: Host, to: Host, version: int, count: int = COUNT) -> None:
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    with host.enter(), socket.socket(family, socket.SOCK_DGRAM) as sock:
        for number in range(count):
            sock.sendto(number.to_bytes(4, "big"), (str(to.address(version)), 7000))


def arrived(sock: socket.socket, count: int) -> list[int]:
    sock.settimeout(10)
    return [int.from_bytes(sock.recv(100), "big") for _ in range(count)]


def end(relay: subprocess.Popen[str]) -> dict[str, dict[str, int]]:
    said, wrong = relay.communicate(timeout=10)
    assert (relay.returncode, wrong) == (0, "")
    return dict(json.loads(said))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("direction", [IN, OUT])
def test_each_packet_has_the_fate_that_its_seed_says(lab: Lab, version: int, direction: str) -> None:
    weather = Weather(5, loss=0.1, duplicate=0.1, reorder=0.2, late_ms=50)
    fates = Fates(weather, direction)
    expected = [fates.next() for _ in range(COUNT)]
    relay = lab.put_relay(weather)
    sender, taker = (lab.peer, lab.origin) if direction == IN else (lab.origin, lab.peer)
    with receiver(taker, version) as sock:
        send(sender, taker, version)
        got = arrived(sock, sum(one.copies for one in expected))
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(100)
    assert sorted(got) == [number for number, fate in enumerate(expected) for _ in range(fate.copies)]
    overtaken = {number for place, number in enumerate(got) if any(later < number for later in got[place:])}
    assert overtaken  # somebody went by
    assert [number for number in got if not expected[number].late_ms] == sorted(
        number for number in got if not expected[number].late_ms)
    did = end(relay)[direction]
    assert (did["seen"], did["lost"]) == (COUNT, sum(not one.copies for one in expected))


@pytest.mark.parametrize("version", [4, 6])
def test_a_round_trip_takes_the_delay_of_both_ways(lab: Lab, version: int) -> None:
    lab.put_relay(Weather(delay_ms=25))
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    with lab.origin.enter():
        listener = socket.create_server((str(lab.origin.address(version)), 7000), family=family)
    with listener, lab.peer.enter():
        begun = time.monotonic()
        with socket.create_connection((str(lab.origin.address(version)), 7000), timeout=10):
            assert time.monotonic() - begun >= 0.05


def test_with_offload_a_stream_arrives_whole(lab: Lab) -> None:
    """Segments come cut or not, with checksums still to be made: the kernel that gets them back makes them."""
    lab.put_relay(Weather(delay_ms=1), offload=True)
    with lab.origin.enter():
        listener = socket.create_server((str(lab.origin.ipv4), 7000))
    data = bytes(range(256)) * 4096
    with listener, lab.peer.enter(), socket.create_connection((str(lab.origin.ipv4), 7000), timeout=10) as sock:
        accepted, _address = listener.accept()
        with accepted:
            accepted.settimeout(10)
            got = bytearray()
            sock.setblocking(False)
            sent = 0
            while len(got) < len(data):
                with contextlib.suppress(BlockingIOError):
                    sent += sock.send(data[sent:])
                got += accepted.recv(1 << 20)
            assert got == data


def test_nothing_of_a_relay_stays(lab: Lab) -> None:
    """With it, the way between the peer and the servers is straight again."""
    relay = lab.put_relay(Weather(loss=1.0))
    relay.kill()
    relay.wait()
    assert "relay" not in lab.gateway.run(["ip", "link"]).stdout
    with receiver(lab.origin, 4) as sock:
        send(lab.peer, lab.origin, 4, 1)
        assert arrived(sock, 1) == [0]
