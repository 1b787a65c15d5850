"""passt's way: all flows of a guest go from the passt beside it on one host to the passt beside it on another.

No machine could be moved faster than none: hypervisor.py stands for a hypervisor, and the guest is a network namespace
that stays where it is. Its own TCP ends at passt, which has a socket of its host towards the peer; that socket is what
moves, by TCP_REPAIR, which passt-repair(1) sets for it.

Both hosts have the guest's address, as passt asks for, and the gateway leads it to one of them. While it is with
neither, the gateway drops: the socket at the origin, which stays in repair mode, would go on to acknowledge what nobody
reads any more, and the destination would answer with a reset. It leads there before the guest goes on.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from criu_tcpcp.lab import Host, Lab
from waiting import until
from world import PORT, Program

from . import Unfit, echoing
from .watched import PRECEDENCE, Watched, figures

ADDRESS = "10.77.3.1"
_NOBODY = (65534, 65534)
_TAP = "tap0"
_STREAM_PORT = 7000
_HYPERVISOR = Path(__file__).with_name("hypervisor.py")


def version(passt: Path) -> str:
    """As `passt --version` tells."""
    try:
        told = subprocess.run([passt, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError as error:
        raise Unfit(f"{passt}: {error.strerror}") from None
    found = re.search(r"^passt (\S+)", told)
    return found[1] if found else "?"


def moves(passt: Path, helper: Path, rounds: int) -> dict[str, Any]:
    """The figures of `rounds` connections, each of which is moved once; `lost`: how many of them were not answered any
    more some time later, by what the peer saw. Raises Unfit if a move fails."""
    number = version(passt)
    seen, lost = [], Counter[str]()
    for _ in range(rounds):
        with Lab(["guest"]) as lab:
            guest = _Guest(lab, (passt, helper))
            watched = Watched.asking(lab, "--echoed", address=ADDRESS)
            guest.prepare()
            watched.move(guest.move)
            if not watched.goes_on():
                lost[watched.ended() or "no answer"] += 1
            seen.append(watched.seen(orderly=False))
    return {**figures(f"passt {number}", seen), "lost": dict(lost)}


class _Passt:
    """One passt, and the socket at which it waits for a hypervisor."""

    def __init__(self, host: Host, programs: tuple[Path, Path]) -> None:
        self.host, self._helper = host, programs[1]
        self.path = host.run_dir / "passt" / "socket"
        self._log = self.path.with_suffix(".log")
        with self._log.open("wb") as log:
            self._process = host.spawn(
                [*PRECEDENCE, programs[0], "--foreground", "--vhost-user", "--socket", self.path, "--ipv4-only",
                 "--interface", host.interface, "--address", ADDRESS, "--mtu", "1500", "--no-map-gw", "--no-dhcp",
                 "--tcp-ports", f"{ADDRESS}/{PORT}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(lambda: self._repair.exists() or self._process.poll() is not None, "passt's sockets")
        if self._process.poll() is not None:
            raise Unfit(f"passt: {self.said()}")

    @property
    def _repair(self) -> Path:
        return self.path.with_name(f"{self.path.name}.repair")

    def allow(self) -> None:
        """Start the helper, which is there for one migration."""
        with self._log.open("ab") as log:
            helper = self.host.spawn([*PRECEDENCE, self._helper, self._repair], stdin=subprocess.DEVNULL, stdout=log,
                                     stderr=log)
        until(lambda: "Accepted TCP_REPAIR helper" in self.said() or helper.poll() is not None, "passt-repair")
        if helper.poll() is not None:
            raise Unfit(f"passt-repair has ended: {self.said()}")

    def said(self) -> str:
        return " ".join(self._log.read_text().split())


class _Guest:
    """The guest, on a host of its own in the lab, and what is at the two hosts where it can be."""

    def __init__(self, lab: Lab, programs: tuple[Path, Path]) -> None:
        self._programs, self._target = programs, lab.destination
        for host in (lab.origin, lab.destination):
            host.run(["ip", "address", "add", f"{ADDRESS}/32", "dev", "lo"])
            directory = host.run_dir / "passt"
            directory.mkdir()
            os.chown(directory, *_NOBODY)      # as whom passt runs
        guest = lab.hosts["guest"]
        _network(guest, lab.gateway)
        echoing.start(guest, lab.directory)
        self._passt = _Passt(lab.origin, programs)
        lab.gateway.run(["ip", "route", "add", ADDRESS, "via", str(lab.origin.ipv4)])
        with _stream(lab) as stream, _gateway(lab.gateway) as gateway:
            argv = [*PRECEDENCE, sys.executable, str(_HYPERVISOR), _TAP, str(self._passt.path),
                    "--stream", *map(str, stream), "--gateway", *map(str, gateway)]
            self._hypervisor = Program(guest, argv, stdin=subprocess.PIPE, pass_fds=(*stream, *gateway))
        self._told("running", 1)

    def prepare(self) -> None:
        """What is there before a move begins: passt at the other host, connected, and the helpers."""
        self._next = _Passt(self._target, self._programs)
        self._ask(f"prepare {self._next.path}", "prepared")
        for one in (self._passt, self._next):
            one.allow()

    def move(self) -> dict[str, float]:
        """To the other host: what each step took, in ms."""
        return dict(self._ask(f"move {ADDRESS} {self._target.ipv4}", "moved")["steps"])

    def _ask(self, line: str, answer: str) -> dict[str, Any]:
        count = self._hypervisor.count(answer) + 1
        assert self._hypervisor.process.stdin is not None
        self._hypervisor.process.stdin.write(f"{line}\n")
        self._hypervisor.process.stdin.flush()
        return self._told(answer, count)

    def _told(self, event: str, count: int) -> dict[str, Any]:
        hypervisor = self._hypervisor
        until(lambda: hypervisor.count(event) >= count or hypervisor.process.poll() is not None, event)
        if hypervisor.count(event) < count:
            last = hypervisor.words().strip().rpartition("\n")[2]
            raise Unfit(f"not {event}: {last}; passt said: {self._passt.said()}")
        told: dict[str, Any] = hypervisor.wait_for(event, count)
        return told


def _network(guest: Host, router: Host) -> None:
    """The guest's only network card is the TAP device; its address is the hosts'."""
    for command in (f"link delete {guest.interface}", f"tuntap add dev {_TAP} mode tap", f"link set {_TAP} up",
                    f"address add {ADDRESS}/32 dev {_TAP}", f"route add {router.ipv4} dev {_TAP}",
                    f"route add default via {router.ipv4}"):
        guest.run(["ip", *command.split()])


@contextmanager
def _stream(lab: Lab) -> Iterator[tuple[int, int]]:
    """A connection from the origin to the destination, as the one between two hypervisors: its two ends."""
    with lab.destination.enter():
        listener = socket.create_server((str(lab.destination.ipv4), _STREAM_PORT))
    with lab.origin.enter():
        there = socket.socket()
    with listener, there:
        there.connect((str(lab.destination.ipv4), _STREAM_PORT))
        there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back, _address = listener.accept()
        with back:
            yield there.fileno(), back.fileno()


@contextmanager
def _gateway(host: Host) -> Iterator[tuple[int, int]]:
    """An `ip` there that takes commands: its input and its output."""
    # What is sent needs no way back there: the guest's address has none while it moves, but the destination speaks.
    host.run(["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", f"net.ipv4.conf.{host.interface}.rp_filter=0"])
    process = host.spawn([*PRECEDENCE, "ip", "-batch", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        yield process.stdin.fileno(), process.stdout.fileno()
