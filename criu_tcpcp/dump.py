"""`dump`: the state of one connection into an image directory, in CRIU's format.

With `leave_running` the connection is only read: stopped, held, read and compared as a pass does it, and given back at
once (core/snapshot.py is the order); the files are written afterwards, when nobody waits for them any more. Nothing of
it outlives the keeper: killed at any instant, the kernel gives the connection back.

Without, the directory is the destination of a pass: `serve --images` is its other side (imagewriter.py), on this host,
and what is committed is that the files are complete. So the order, the doubt and its settlement are those of every
pass. The old endpoint ends in silence, and the fence stays, since nothing else would keep this host from answering the
peer's next packet with a reset: until `release ID`.
"""

from __future__ import annotations

import functools
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import imagedir, journal, passing, settle
from .core import imageset, snapshot
from .core.endpoint import Protocol
from .core.errors import ExitCode, Owner, Refused, TcpcpError, UsageError
from .core.handoff import ORIGIN_FINAL, Event, Machine, OriginState
from .core.refusals import Refusal
from .executor import Executor, without_garbage_collection
from .inventory import Connection
from .journal import Journal
from .kernel import netns, syscalls
from .origin import Options, Origin
from .passing import Progress
from .report import PassError, Report
from .transport.target import LocalTarget, Target


class Snapshot(Origin):
    """The origin's half of a pass that goes nowhere: all that reads the connection, and nothing that gives it away."""

    def stage(self) -> None:
        """What the freeze needs on this host. Refused: nothing was touched."""
        self._take()
        self._stage_here()

    def files(self) -> dict[str, bytes]:
        """Of the directory, once the connection was read."""
        connection, image = self._connection, self._need(self._extraction).image
        owner = imageset.Owner(connection.pid, connection.process_name, connection.descriptors)
        return imagedir.files_of(image, connection.inode, owner, self._app_state, self.journal.pass_id,
                                 left_running=True)


def dump_connection(pid: int, fd: int, directory: str | Path, *, leave_running: bool = False,
                    progress: Progress | None = None, **options: Any) -> Report:
    """Write the state of the connection behind descriptor `fd` of process `pid` into `directory`, a new or an empty
    one, and end it at this host, unless `leave_running`.

    `options`: `idle_ms`, `max_stall_ms`, `origin_sees`, as of a pass. Raises PassError unless all of it was done.
    """
    place = Path(directory)
    try:
        place = imagedir.absolute(directory)
        if options.keys() - {"idle_ms", "max_stall_ms", "origin_sees"}:
            raise UsageError(f"unknown option {sorted(options)[0]}")
        connection = passing.check(pid, fd, {Refusal.ECN})  # whoever restores it may refuse
        if connection.protocol is not Protocol.TCP:
            raise Refused(f"descriptor {fd} of process {pid} is a UDP socket, whose queue CRIU's images do not hold",
                          hint="pass it to a host instead")
        journal.prepare_run_directory()
        imagedir.refuse_unfit(place)
        record = Journal(journal.new_id(), journal.ORIGIN)
        try:
            report = (_read_only if leave_running else _take)(record, connection, place, progress, options)
        finally:
            if record.last() not in journal.UNSETTLED:  # else a resolve may still need them
                imagedir.discard(place, record.pass_id)
    except PassError:
        raise
    except TcpcpError as error:
        raise PassError(passing.refused(pid, fd, error)) from error
    if report.exit is not ExitCode.OK:
        raise PassError(report)
    return report


def _read_only(record: Journal, connection: Connection, place: Path, progress: Progress | None,
               options: dict[str, Any]) -> Report:
    nowhere = LocalTarget((sys.executable,))  # no link is opened
    work = functools.partial(read_in_keeper, place=place)
    return passing.run_keeper(record, connection, nowhere, Options(**options), progress, work)


def _take(record: Journal, connection: Connection, place: Path, progress: Progress | None,
          options: dict[str, Any]) -> Report:
    if connection.flow is None:
        raise Refused("the socket is not connected")
    owner = [word for number in connection.descriptors for word in ("--fd", str(number))]
    writer = LocalTarget((sys.executable, "-m", __package__, "serve", "--images", str(place),
                          "--pid", str(connection.pid), *owner))
    # No way leads to a directory: what still comes is dropped here, by the fence. So there must be no next hop, which
    # an address of the other IP version never is; the connection's own address may be on a link, if this host has the
    # connection from its owner, and packets sent back there would go in a circle.
    nowhere = "::1" if connection.flow.ip_version == 4 else "127.0.0.1"
    wanted = Options(into="images", redirect="none", via=nowhere, **options)
    report = passing.run_keeper(record, connection, writer, wanted, progress)
    if report.exit in (ExitCode.ROLLED_BACK, ExitCode.REFUSED):
        settle.sweep_host()  # what a killed writer has left
    if report.owner is Owner.DESTINATION:
        report = replace(report, owner=Owner.NONE, redirect="")  # at rest: nobody speaks for it
    return report


def read_in_keeper(control: socket.socket, record: Journal, connection: Connection, target: Target | LocalTarget,
                   options: Options, *, place: Path) -> Report:
    """What the keeper does: read, give back, and then write."""
    side = Snapshot(record, connection, target, options)
    machine: Machine[OriginState] = snapshot.machine()
    executor = Executor(machine, side, ORIGIN_FINAL)
    problem: TcpcpError | None = None
    try:
        try:
            with netns.enter(side.program.namespace), record.claimed(side.flow.to_json()):
                side.stage()
                record.write("note", place=str(place))
                imagedir.begin(place, record.pass_id)
                with without_garbage_collection():
                    syscalls.go_first()
                    executor.run(Event.START)
                    syscalls.go_along()
                if executor.failure is None:
                    imagedir.write(place, record.pass_id, side.files())
                    imagedir.publish(place, record.pass_id)
        except TcpcpError as error:
            problem = error
        report = _report(side, executor, place, executor.failure or problem)
        if record.exists():
            record.remove()
        return report
    finally:
        with netns.enter(side.program.namespace):
            side.close()


def _report(side: Snapshot, executor: Executor[OriginState], place: Path, problem: TcpcpError | None) -> Report:
    code, error, hint = ExitCode.OK, None, ""
    if problem is not None:
        code = ExitCode.ROLLED_BACK if side.touched else ExitCode.REFUSED
        error, hint = f"{problem.message}; nothing was written, the origin process has its connection", problem.hint
    elif executor.left:
        code, error = ExitCode.UNCLEAN, "; ".join(executor.left)
    holding = side.holding
    stall = holding.duration_ms if holding is not None else None
    return Report(
        id=side.journal.pass_id, owner=Owner.ORIGIN, exit=code, connection=str(side.flow),
        into=f"images {place}" if problem is None else "",
        steps=tuple(("origin", name, ms) for name, ms in executor.steps),
        stall_ms=round(stall, 3) if stall is not None else None, left=tuple(executor.left), error=error, hint=hint,
        details={"held_packets": holding.packets if holding is not None else 0})
