"""A world (world.py) whose connection is a UDP one."""

from __future__ import annotations

import contextlib
import ipaddress
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from criu_tcpcp import verify
from criu_tcpcp.core.endpoint import Endpoint, Flow, Protocol
from criu_tcpcp.lab import Host, Lab
from criu_tcpcp.verify.datagrams import judge_datagrams, parse_datagrams
from waiting import until
from world import PORT, Program, World, captured, capturing, users

SERVER = [sys.executable, "-m", "criu_tcpcp.lab.datagrams", "server", "--port", str(PORT)]


class DatagramWorld(World):
    """At the origin a server that answers datagrams, at the destination one that takes connections."""

    def __init__(self, lab: Lab, *, version: int = 4, listen: str | None = None, register: bool = False,
                 destination_argv: list[str] | None = None) -> None:
        address = listen or ("0.0.0.0" if version == 4 else "::")
        extra = ["--register"] if register else []
        super().__init__(lab, version=version, waiting=False, programs={
            lab.origin.name: [*SERVER, "--listen", address, *extra],
            lab.destination.name: destination_argv or [*SERVER, *extra]})
        self.nodes[lab.origin.name].wait_for("listening")
        if destination_argv is None:
            self.nodes[lab.destination.name].wait_for("listening")

    def _captures_on(self) -> None:
        for host, role in ((self.lab.peer, verify.Role.PEER), (self.lab.origin, verify.Role.ORIGIN),
                           (self.lab.destination, verify.Role.DESTINATION)):
            path = self.lab.directory / f"{role.value}.pcap"
            self._captures.append((role.value, role, capturing(host, path, what=f"(udp and port {PORT})"), path))

    def judged(self, passes: int) -> list[str]:
        """What the captures show that must not be."""
        assert self.flow is not None
        found = [parse_datagrams(captured(process, path), role, self.flow)
                 for _name, role, process, path in self._captures]
        self._captures = []
        assert all(capture.datagrams for capture in found)
        return judge_datagrams(found, self.flow, passes)

    def _until_it_listens(self, host: Host, port: int) -> None:
        """It says so itself."""

    def knows_peer(self, port: int, address: object = None) -> None:
        self.flow = Flow(Endpoint(ipaddress.ip_address(str(self.lab.origin.address(self.version))), PORT),
                         Endpoint(ipaddress.ip_address(str(self.lab.peer.address(self.version))), port),
                         protocol=Protocol.UDP)
        until(lambda: self.serving(self.owner), "the socket to be connected", every_s=0.02)

    def serving(self, host: Host) -> list[tuple[int, int]]:
        assert self.flow is not None
        chosen = ["sport", "=", str(self.flow.local.port), "dport", "=", str(self.flow.peer.port)]
        return users(self.homes[host.name].run(["ss", "-unpH", "state", "all", *chosen]).stdout)


class DatagramPeer:
    """A `lab.datagrams peer`, which talks until it is told to stop."""

    def __init__(self, here: DatagramWorld, *options: str) -> None:
        argv = [sys.executable, "-m", "criu_tcpcp.lab.datagrams", "peer", str(here.lab.origin.address(here.version)),
                str(PORT), *options]
        self.program = Program(here.lab.peer, argv, stdin=subprocess.PIPE)
        here.knows_peer(int(self.program.wait_for("ready")["words"][1]))

    def finish(self) -> dict[str, Any]:
        assert self.program.process.stdin is not None
        self.program.process.stdin.close()
        until(lambda: any("program" in one for one in self.program.events), "the peer's report")
        return next(one for one in self.program.events if "program" in one)


@contextlib.contextmanager
def datagram_world(*, apart: tuple[str, ...] = (), **options: Any) -> Iterator[DatagramWorld]:
    with Lab(apart=[*apart]) as lab:
        yield DatagramWorld(lab, **options)
