"""What this host can do, tried on the real thing: each feature is one function that does it and undoes it.

Kernel versions are never compared: a vendor's kernel has what it has. `check` runs them in a network namespace of its
own, so that nothing of the host is touched; `check --host` lets the other host do the same, through its `serve`. One
that may not make a namespace tries them in the host's, where each takes away what it made.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .core.criu import messages as load_criu_messages
from .core.endpoint import Protocol
from .core.errors import ProtocolError, Refused, TcpcpError, UsageError
from .core.messages import Refused as RefusedMessage
from .core.messages import Tried, Try
from .greeting import greet
from .journal import prepare_run_directory, run_directory
from .kernel import netns, repair, syscalls
from .kernel.grace import GracePeriod
from .kernel.nfqueue import PacketQueue
from .kernel.rawpacket import Injector
from .kernel.rules import MARK, Hold, HostRules, reassembles
from .kernel.syscalls import failing
from .kernel.tracee import Tracee
from .rehearsal import rehearse
from .transport.link import open_link
from .transport.target import Target
from .transport.wire import Wire

_TRY_TIMEOUT_S = 30.0
_RECORDS_BYTES = 1 << 14  # of one pass, without the queues


@dataclass(frozen=True)
class Feature:
    """`problem`: None where it works. Without a `required` one nothing can be passed; the others have a substitute."""

    name: str
    meaning: str
    required: bool
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "works": self.problem is None, "required": self.required,
                "meaning": self.meaning, "problem": self.problem}


def _repair() -> None:
    with socket.socket() as sock, repair.in_repair(sock):
        pass


def _hold() -> None:
    for version in (4, 6):
        queue = PacketQueue()
        hold = Hold(version, queue.number)
        hold.close()
        queue.close()
        if not hold.queues:
            raise Refused("no rule of this kernel can send packets to a queue: they are dropped during a pass instead")


def _datagrams() -> None:
    for version in (4, 6):
        rehearse(version, Protocol.UDP)
        if not reassembles(version):
            raise Refused("no rule of this kernel has fragments put together (CONFIG_NFT_TPROXY): a datagram in "
                          "several packets is lost during and after a pass")


def _rules() -> None:
    for version in (4, 6):
        rules = HostRules(version)
        rules.prepare_fence()
        rules.sweep()
        rules.close()


def _raw() -> None:
    for version in (4, 6):
        Injector(version, MARK).close()


def _grace() -> None:
    grace = GracePeriod()
    fast = grace.fast
    grace.wait()
    grace.close()
    if not fast:
        raise Refused("no TUN interface: a grace period takes some 10 ms instead of 0.2")


def _stop() -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        syscalls.allow_tracing()  # serve forbids it
        os.write(writing, b"!")
        while True:
            os.sched_yield()
    try:
        os.read(reading, 1)
        tracee = Tracee(pid)
        tracee.stop(1)
        tracee.resume()
        os.close(syscalls.pidfd_getfd(syscalls.pidfd_open(pid), 2))
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)


def _images() -> None:
    load_criu_messages()


def _restore() -> None:
    for version in (4, 6):
        rehearse(version)


def _run_directory() -> None:
    prepare_run_directory()
    with (failing(f"write to {run_directory()}"),
          tempfile.NamedTemporaryFile(dir=run_directory() / "passes", prefix=".check-") as file):
        file.write(bytes(_RECORDS_BYTES))
        file.flush()


_FEATURES: dict[str, tuple[str, bool, Callable[[], None]]] = {
    "tcp-repair": ("the state of a connection can be read and set", True, _repair),
    "rules": ("packets can be fenced, forwarded and diverted (nf_tables)", True, _rules),
    "hold": ("packets wait during a pass instead of being dropped", False, _hold),
    "raw-packets": ("the peer's timestamp can be learnt and set", True, _raw),
    "grace-period": ("a pass need not wait long for other CPUs", False, _grace),
    "stop": ("a process can be stopped, and its descriptors copied", True, _stop),
    "images": ("CRIU's message classes are installed", True, _images),
    "restore": ("a connection can be read, re-created from its image, and used", True, _restore),
    "datagrams": ("a connected UDP socket can be read, re-created, and used", False, _datagrams),
    "run-directory": ("passes can be recorded", True, _run_directory),
}


def check(only: str | None = None) -> list[Feature]:
    """Try them as root. UsageError for a name that is none."""
    if os.geteuid() != 0:
        raise Refused("root is needed (CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_PTRACE)", hint="run it with sudo")
    return attempt(only)


def attempt(only: str | None = None) -> list[Feature]:
    """Try them as whoever this is. UsageError for a name that is none."""
    if only is not None and only not in _FEATURES:
        raise UsageError(f"there is no feature {only!r}", hint="one of " + ", ".join(_FEATURES))
    return [Feature(name, meaning, required, _problem(trial))
            for name, (meaning, required, trial) in _FEATURES.items() if only in (None, name)]


def _problem(trial: Callable[[], None]) -> str | None:
    try:
        with netns.private_or_own():
            trial()
    except TcpcpError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class HostCheck:
    """What another host says of itself."""

    host: str
    version: str
    features: tuple[Feature, ...]

    def to_json(self) -> dict[str, Any]:
        return {"host": self.host, "version": self.version, "features": [one.to_json() for one in self.features]}


def check_host(target: Target, only: str | None = None) -> HostCheck:
    """Let the other host try the same, in a network namespace of its own. LinkError or Refused where it cannot be
    reached or does not fit."""
    with open_link(target) as link:
        wire = Wire(link.fileno(), link.fileno())
        hello = greet(link, wire)
        wire.send(Try(only or ""))
        answer = wire.receive(_TRY_TIMEOUT_S)
    if isinstance(answer, RefusedMessage):
        raise Refused(f"{hello.host} refuses: {answer.reason}", hint=answer.hint)
    if not isinstance(answer, Tried):
        raise ProtocolError("the other host answered out of turn")
    return HostCheck(hello.host, hello.version, tuple(_feature(one) for one in answer.features))


def _feature(value: Any) -> Feature:
    try:
        name, meaning, required, problem = (value[key] for key in ("name", "meaning", "required", "problem"))
    except (KeyError, TypeError):
        raise ProtocolError("the other host described a feature in another way") from None
    if not (type(name) is str and type(meaning) is str and type(required) is bool
            and (problem is None or type(problem) is str)):
        raise ProtocolError("the other host described a feature in another way")
    return Feature(name, meaning, required, problem)
