"""A connection that is passed on: the host that the peer's packets come by sends them to where it lives now, and what
lies between sees none any more."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import sys
from collections.abc import Iterator, Sequence

import pytest

from attempt import exchange
from behind import BehindWorld, put_behind
from criu_tcpcp import journal, verify
from criu_tcpcp.lab import Host, Lab, leftovers
from grafting import server
from waiting import until
from world import COMMAND, PORT, Peer, Program, World, _run_directory, capturing

pytestmark = pytest.mark.root


def add_third(here: World, argv: Sequence[str]) -> Host:
    """A host more for passes from any to any, with this program."""
    third = here.lab.hosts["third"]
    here.homes[third.name] = third
    here.clean[third.name] = leftovers(third)
    with _run_directory(third.run_dir):
        journal.prepare_run_directory()
    here.nodes[third.name] = Program(third, argv)
    here.lab.origin.start_sshd()
    return third


class Chain(World):
    """Three hosts, and passes from any to any. To the judge of the wire the two that have not the address are one."""

    def __init__(self, lab: Lab, version: int) -> None:
        self.next = lab.destination
        super().__init__(lab, "rr", version=version, whole=True, everywhere=True)
        third = self.third = add_third(self, [sys.executable, "-m", "criu_tcpcp.lab.node", "--port", str(PORT),
                                              "--kind", "rr", "--register"])
        self.nodes[third.name].wait_for("listening")
        third.run(["ip", "link", "set", "dev", third.interface, "gso_max_segs", "1"])
        path = lab.directory / "third.pcap"
        process = capturing(third, path, 0, interface="any")
        self._captures.append((verify.Role.DESTINATION.value, verify.Role.DESTINATION, process, path))

    @property
    def other(self) -> Host:
        return self.next

    def on(self, host: Host, *options: str) -> dict[str, object]:
        self.next = host
        return self.pass_once("--max-stall", "5000", *options, attempts=3)

    def captures(self) -> list[verify.Capture]:
        assert self.flow is not None
        *others, second, third = super().captures()
        said = [packet for one in (second, third) for packet in one.packets if packet.src == self.flow.local]
        said.sort(key=lambda packet: packet.time_ns)
        return [*others, dataclasses.replace(second, packets=tuple(said), icmp=(*second.icmp, *third.icmp))]

    def release(self) -> list[str]:
        left: list[str] = []
        for host in (self.third, self.lab.destination, self.lab.origin):
            said = host.run([COMMAND, "release"]).stdout
            left += [f"{host.name}: {line}" for line in said.splitlines() if line.startswith("kept")]
        for node in self.nodes.values():
            node.end()
        return left + [f"{host.name}: {line}" for host in self.places for line in self.left_at(host)]


class Counter:
    """Of the peer's packets that come to a host."""

    def __init__(self, host: Host, peer: object, version: int) -> None:
        self._host, self._family = host, "ip" if version == 4 else "ip6"
        host.run(["nft", f"table {self._family} seen {{ counter seen {{ }}; chain seen {{ type filter hook prerouting "
                         f"priority -400; {self._family} saddr {peer} counter name seen; }}; }}"])

    def count(self) -> int:
        listed = json.loads(self._host.run(["nft", "-j", "list", "counters"]).stdout)
        return int(next(one["counter"]["packets"] for one in listed["nftables"] if "counter" in one))

    def remove(self) -> None:
        self._host.run(["nft", f"delete table {self._family} seen"])


@contextlib.contextmanager
def chain(version: int, apart: tuple[str, ...] = ()) -> Iterator[tuple[Chain, Peer]]:
    with Lab(["third"], apart=apart) as lab:
        here = Chain(lab, version)
        yield here, Peer(here, "rr-peer", "--rate", "100", "--until-eof")


def sees_none(here: Chain, host: Host) -> None:
    """While the load goes on at the owner's."""
    counter = Counter(host, here.lab.peer.address(here.version), here.version)
    owner = Counter(here.owner, here.lab.peer.address(here.version), here.version)
    until(lambda: owner.count() > 20, "the load to go on", every_s=0.02)
    assert counter.count() == 0
    counter.remove()
    owner.remove()


def finish(here: Chain, peer: Peer, before: dict[str, int], passes: int) -> None:
    report = peer.finish()
    assert report["error"] is None
    assert report["answers"] == report["requests"] > 0
    here.node.wait_for("end")
    here.prove(before, application=report, passes=passes, reorders=True)
    assert here.release() == []


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("back", [False, True], ids=["stays", "home"])
def test_passed_on_to_a_third_host(back: bool, version: int) -> None:
    with chain(version) as (here, peer):
        before = here.counters()
        for host in (here.lab.destination, here.third):
            assert here.on(host)["notes"] == []
        sees_none(here, here.lab.destination)
        if back:
            assert here.on(here.lab.origin)["notes"] == []
            sees_none(here, here.third)
        finish(here, peer, before, 2 if back else 1)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("apart", [("third",), ("destination",), ("destination", "third")], ids="-".join)
def test_by_tunnels(apart: tuple[str, ...], version: int) -> None:
    """The host that the packets come by makes a way of its own, on its link or by a tunnel, whatever the way between
    the other two is."""
    with chain(version, apart) as (here, peer):
        before = here.counters()
        for host in (here.lab.destination, here.third):
            assert here.on(host, "--via", str(host.ipv4 if version == 4 or apart else host.ipv6))["notes"] == []
        sees_none(here, here.lab.destination)
        # A tunnel over IPv6 is too narrow here, and without one what was held on its way home would be dropped.
        assert here.on(here.lab.origin, "--via", str(here.lab.origin.ipv4))["notes"] == []
        finish(here, peer, before, 2)


@pytest.mark.parametrize("version", [4, 6])
def test_a_host_that_cannot_be_told_asks_later(version: int) -> None:
    """The connection works all the same, and the report is no error."""
    with chain(version) as (here, peer):
        before = here.counters()
        passed_as = str(here.on(here.lab.destination)["id"])
        here.lab.origin.run(["nft", "table inet deaf { chain deaf { type filter hook input priority 0; "
                                    "tcp dport 22 reject with tcp reset; }; }"])
        notes = here.on(here.third)["notes"]
        assert isinstance(notes, list)
        assert "still sends the peer's packets here, whence they are sent on" in notes[0]
        assert f"criu-tcpcp resolve {passed_as}" in notes[0]
        counter = Counter(here.lab.destination, here.lab.peer.address(version), version)
        until(lambda: counter.count() > 0, "packets to come by the host between", every_s=0.02)
        counter.remove()
        here.lab.origin.run(["nft", "delete table inet deaf"])
        done = here.lab.origin.run([COMMAND, "resolve", passed_as, "--json"])
        assert done.returncode == 0
        sees_none(here, here.lab.destination)
        finish(here, peer, before, 1)


class BehindChain(BehindWorld):
    next: Host | None = None

    @property
    def other(self) -> Host:
        return self.next or super().other


@pytest.mark.parametrize("version", [4, 6])
def test_out_of_a_container_behind_its_host(version: int) -> None:
    """It is the host, in front of its NAT, that sends the packets elsewhere."""
    argv = server("threads", "0.0.0.0" if version == 4 else "::")
    with Lab(["box", "third"]) as lab:
        put_behind(lab, lab.origin, nat=True)
        here = BehindChain(lab, ["origin"], nat=True, version=version, captured=False,
                           programs=dict.fromkeys(("origin", "destination"), argv))
        third = add_third(here, argv)
        with lab.peer.enter(), socket.create_connection(here.seen, timeout=20) as peer:
            here.knows_peer(peer.getsockname()[1])
            for here.next in (lab.destination, third):
                assert here.pass_once(*here.into())["notes"] == []
                exchange(peer, b"there" * 1000)
            between = Counter(lab.destination, lab.peer.address(version), version)
            exchange(peer, b"straight on" * 1000)
            assert between.count() == 0
            here.next = lab.origin
            assert here.pass_once(*here.into())["notes"] == []
            exchange(peer, b"home" * 1000)
