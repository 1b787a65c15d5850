"""What can happen to a pass at one of its steps, under a load, and what must be true afterwards.

A `Case` names the step (a side's action, as in CRIU_TCPCP_STOP_AT), the fault and the load. `play` runs it in a lab of
its own: a conversation begins, a pass is caught at the step, the fault strikes, everything goes on, the fault ends, and
`resolve` settles what is in doubt. Then it asks, whatever the case:

- whoever answers the peer is the one owner, and nobody was told of another;
- the peer got the right bytes, and an orderly end, unless the program or the host that it talked to was the victim;
- no process is stopped, none of ours is left, and after `release` no rule, file or route.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from attempt import Attempt, state
from criu_tcpcp.core import handoff
from criu_tcpcp.core.errors import ExitCode
from criu_tcpcp.core.handoff import DestinationState, Event, OriginState
from criu_tcpcp.lab import Host, Lab, processes
from waiting import until
from world import COMMAND, Peer, World


def _points(side: str, table: Any, *keys: Any) -> list[str]:
    return [f"{side}:{action.value}" for key in keys for action in table[key].actions]


_READING = _points("origin", handoff.ORIGIN, (OriginState.READY, Event.START))
_SENT = _READING.index("origin:send prepare") + 1
#: The way of a pass that goes well, in the order in which it is gone. What the other side does meanwhile stands behind.
STEPS = (
    *_READING[:_SENT],
    *_points("destination", handoff.DESTINATION, (DestinationState.READY, Event.PREPARE),
             (DestinationState.PREPARING, Event.DONE)),
    *_READING[_SENT:],
    *_points("origin", handoff.ORIGIN, (OriginState.PREPARED, Event.PREPARED), (OriginState.OFFERING, Event.DONE)),
    *_points("destination", handoff.DESTINATION, (DestinationState.PREPARED, Event.COMMIT),
             (DestinationState.CHECKING, Event.DONE), (DestinationState.DECIDING, Event.DECIDED_COMMITTED),
             (DestinationState.COMMITTED, Event.DONE)),
    *_points("origin", handoff.ORIGIN, (OriginState.OFFERED, Event.COMMITTED), (OriginState.COMMITTED, Event.ACTIVE)),
)


@dataclass(frozen=True)
class Load:
    """What the peer's program is told, and what the programs that answer it are. `captured`: few enough packets to be
    judged by the wire assertions."""

    peer: tuple[str, ...]
    node: tuple[str, ...] = ()
    captured: bool = False


LOADS = {
    "idle": Load(("rr-peer", "--rate", "1"), captured=True),
    "requests": Load(("rr-peer", "--rate", "200"), captured=True),
    "bulk in": Load(("burst-peer", "--size", "20000", "--answer-size", "10", "--burst", "10", "--pause", "0.05"),
                    ("--size", "20000", "--answer-size", "10")),
    "bulk out": Load(("burst-peer", "--size", "10", "--answer-size", "20000", "--burst", "10", "--pause", "0.05"),
                     ("--size", "10", "--answer-size", "20000")),
}

_DISK = "2m"
_STALL_S = 4.0  # longer than either side waits for an answer


@dataclass(frozen=True)
class Case:
    step: str
    fault: str
    load: str
    then: str | None = None  # a second point, at which whoever reaches it is killed

    def __str__(self) -> str:
        return "-".join([self.step.replace(" ", "_"), self.fault, self.load, *([self.then] if self.then else [])])


@dataclass
class Scene:
    """A case that is being played. `gone`: hosts that have vanished; `dead`: those whose program was killed."""

    case: Case
    here: World
    peer: Peer
    attempt: Attempt
    gone: set[str] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)
    is_struck_again: bool = False

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.here.lab.origin, self.here.lab.destination


Fault = Callable[[Scene], contextlib.AbstractContextManager[None]]


def _killed(*victims: str) -> Fault:
    @contextlib.contextmanager
    def fault(scene: Scene) -> Iterator[None]:
        scene.attempt.kill(*victims)
        yield
    return fault


def _program_killed(name: str) -> Fault:
    @contextlib.contextmanager
    def fault(scene: Scene) -> Iterator[None]:
        scene.here.nodes[name].process.kill()  # its end comes when its tracer lets it
        scene.dead.add(name)
        yield
    return fault


def _host_gone(name: str) -> Fault:
    """No goodbye: the wire is cut first. What ran there is killed, but for the test's own captures."""
    @contextlib.contextmanager
    def fault(scene: Scene) -> Iterator[None]:
        host = scene.here.lab.hosts[name]
        host.run(["ip", "link", "set", "dev", host.interface, "down"])
        scene.gone.add(name)
        scene.dead.add(name)
        for pid in processes.inside([host.netns]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        yield
    return fault


def _disk_full(name: str) -> Fault:
    @contextlib.contextmanager
    def fault(scene: Scene) -> Iterator[None]:
        directory = scene.here.lab.hosts[name].run_dir
        room, filler = os.statvfs(directory), directory / "filler"
        filler.write_bytes(bytes(room.f_bavail * room.f_frsize))
        yield
        filler.unlink()
    return fault


@contextlib.contextmanager
def _link_stalled(scene: Scene) -> Iterator[None]:
    """No segment of any SSH connection arrives any more, until both sides have waited in vain."""
    table = "table inet stalled { chain input { type filter hook input priority 0; tcp dport 22 drop; }; }"
    destination = scene.here.lab.destination
    destination.run(["nft", "-f", "-"], input=table)
    lifting = threading.Timer(_STALL_S, destination.run, (["nft", "delete", "table", "inet", "stalled"],))
    lifting.start()
    yield
    lifting.join()


@contextlib.contextmanager
def _call_fails(scene: Scene) -> Iterator[None]:
    yield  # by the environment of the process that comes to the step


FAULTS: dict[str, Fault] = {
    "command": _killed("command"), "keeper": _killed("keeper"), "command+keeper": _killed("command", "keeper"),
    "serve": _killed("serve"), "keeper+serve": _killed("keeper", "serve"), "link cut": _killed("link"),
    "link stalled": _link_stalled, "errno": _call_fails,
    "origin's disk full": _disk_full("origin"), "destination's disk full": _disk_full("destination"),
    "origin's program killed": _program_killed("origin"),
    "destination's program killed": _program_killed("destination"),
    "origin gone": _host_gone("origin"), "destination gone": _host_gone("destination"),
}


@dataclass(frozen=True)
class Outcome:
    """`owner`: the host whose program ended the conversation in order; None where the peer saw an end of another kind.
    `settled_s`: from the fault's end until nothing was in doubt."""

    owner: str | None
    settled_s: float


def play(case: Case) -> Outcome:
    """See the module. AssertionError says what was not true."""
    load = LOADS[case.load]
    with Lab() as lab:
        for host in (lab.origin, lab.destination):
            host.limit_run_directory(_DISK)
            host.run(["sysctl", "-qw", "net.ipv4.tcp_orphan_retries=1"])  # else an end that nobody hears takes minutes
        here = World(lab, "rr", node_options=load.node, captured=load.captured)
        peer = Peer(here, *load.peer, "--until-eof")
        errno_name = "EIO" if case.fault == "errno" else ""
        # Doubt lasts as long as the fault: that it may cost the connection is another test's affair.
        attempt = Attempt(here, case.step, "--doubt-limit", "30", fails_with=errno_name, also=case.then or "")
        scene = Scene(case, here, peer, attempt)
        with FAULTS[case.fault](scene):
            scene.attempt.go_on()
            _kill_who_stops_again(scene)
            said = _ended(scene)
        over = time.monotonic()
        said += _settled(scene)
        settled_s = time.monotonic() - over
        return Outcome(_judged(scene, said), settled_s)


def _kill_who_stops_again(scene: Scene) -> None:
    """At the case's second point, which may never be reached."""
    attempt = scene.attempt
    while True:
        until(lambda: attempt.stopped() or not attempt.works(), "the pass to go on or to end", every_s=0.02)
        if not attempt.stopped():
            return
        for pid in attempt.stopped():
            _kill_here(scene, pid)


def _kill_here(scene: Scene, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: state(pid) in ("", "Z"), "its end")
    scene.is_struck_again = True


def _ended(scene: Scene) -> list[dict[str, Any]]:
    """What the command said, if it lives, once the keeper has ended."""
    report = scene.attempt.outcome()
    until(lambda: not scene.attempt.find("tcpcp-keeper"), "the keeper to end", every_s=0.02)
    return [report] if report is not None else []


def _settled(scene: Scene) -> list[dict[str, Any]]:
    """What `resolve` says, after one that was killed at the case's second point; of a host that is gone, nothing."""
    origin, destination = scene.hosts
    then = scene.case.then or ""
    if origin.name in scene.gone:
        return []
    if then.startswith("resolve:"):
        first = origin.spawn([COMMAND, "resolve"], env={"CRIU_TCPCP_STOP_AT": then}, stdout=subprocess.DEVNULL)
        until(lambda: first.poll() is not None or state(first.pid) == "T", "resolve to end or to stop", every_s=0.02)
        first.kill()
        first.wait()
    if destination.name in scene.gone:
        return _forced(origin)
    settling = origin.spawn([COMMAND, "resolve", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while settling.poll() is None:
        _strike_again_once(scene)
        with contextlib.suppress(subprocess.TimeoutExpired):
            settling.wait(0.02)
    out, err = settling.communicate()
    assert "Traceback" not in err, err
    assert settling.returncode != ExitCode.IN_DOUBT, (out, err)
    return [json.loads(line) for line in out.splitlines()]


def _strike_again_once(scene: Scene) -> None:
    """Every `serve` that the pass's target starts stops at the case's second point: the first one is killed there, and
    those behind it go on."""
    for pid in scene.attempt.stopped():
        if not scene.is_struck_again:
            _kill_here(scene, pid)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _forced(origin: Host) -> list[dict[str, Any]]:
    """The destination will never answer again, and the operator knows it."""
    said = []
    for line in origin.run([COMMAND, "passes", "--json"]).stdout.splitlines():
        known = json.loads(line)
        if known["state"] == "in doubt":
            forced = origin.run([COMMAND, "resolve", known["id"], "--force-origin", "--json"], check=False)
            assert "Traceback" not in forced.stderr, forced.stderr
            said += [json.loads(one) for one in forced.stdout.splitlines()]
    return said


def _judged(scene: Scene, said: list[dict[str, Any]]) -> str | None:
    here, victims = scene.here, scene.gone | scene.dead
    told = {one["owner"] for one in said} - {"unknown"}
    assert len(told) <= 1, said
    until(lambda: not scene.attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
    for name in here.nodes.keys() - victims:
        pid = here.nodes[name].process.pid
        until(lambda pid=pid: state(pid) in ("S", "R"), f"{name}'s program to run")  # type: ignore[misc]
    owner = None
    if not victims or told & (here.nodes.keys() - victims):
        owner = _orderly_end(scene)
        assert told <= {owner}, (owner, said)
    if owner is not None and not victims and LOADS[scene.case.load].captured:
        here.prove(passes=int(owner == scene.hosts[1].name), loss_free=False, changes=False)
    for node in here.nodes.values():
        node.end()
    scene.peer.program.end()
    for host in scene.hosts:
        if host.name not in scene.gone:
            _cleaned(scene, host)
    return owner


def _orderly_end(scene: Scene) -> str:
    """The peer's conversation was whole, and is ended by the host that this returns."""
    here, destination = scene.here, scene.hosts[1].name
    report = scene.peer.finish()
    owner = destination if here.nodes[destination].count("serving") else scene.hosts[0].name
    assert report["error"] is None, (report, here.nodes[owner].events)
    assert report["answers"] == report["requests"], report
    assert report.get("sha256_received") == report.get("sha256_expected")
    assert here.nodes[owner].wait_for("end")["error"] is None
    return owner


def _cleaned(scene: Scene, host: Host) -> None:
    """`release` leaves nothing; by force where the other side can never confirm."""
    left: list[str] = []

    def is_clean() -> bool:
        host.run([COMMAND, "release"])
        for line in host.run([COMMAND, "passes", "--json"]).stdout.splitlines() if scene.gone | scene.dead else ():
            host.run([COMMAND, "release", json.loads(line)["id"], "--force"], check=False)
        left[:] = scene.here.left_at(host)
        return not left
    try:
        until(is_clean, f"nothing to be left at {host.name}", every_s=0.2)
    except AssertionError as error:
        error.add_note("\n".join(left))
        raise
