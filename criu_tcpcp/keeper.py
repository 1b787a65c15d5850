"""The keeper: the small process at the origin that is the tracer and owns the hold and the fence.

The command forks it and only instructs it: it reads from `control` that the pass is to be undone (a byte, or the end of
the stream because the command died), and hears from it progress and, at the end, the report. The keeper stages the
pass, runs the executor and reports; once the pass is offered, the command's end no longer matters to it. Its own end
does not matter to the connection: before the offer the kernel undoes everything, after it the journal has what
`resolve` needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from . import carrier, carrying, onward
from .core import handoff
from .core.errors import ExitCode, Owner, TcpcpError
from .core.handoff import ORIGIN_FINAL, OWNER, Action, Event, OriginState
from .executor import Executor, without_garbage_collection
from .inventory import Connection
from .journal import Journal
from .kernel import netns, syscalls
from .origin import Options, Origin
from .report import Report
from .transport.target import LocalTarget, Target

#: What a keeper is to do: `run`, or the reading of `dump`.
Work = Callable[[socket.socket, Journal, Connection, Target | LocalTarget, Options], Report]


def start(journal: Journal, connection: Connection, target: Target | LocalTarget, options: Options,
          work: Work | None = None) -> tuple[int, socket.socket]:
    """Fork the keeper. Returns its process id and the command's end of the control stream."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    ours.close()
    return _keep(theirs, journal, connection, target, options, work or run)


def _keep(control: socket.socket, journal: Journal, connection: Connection, target: Target | LocalTarget,
          options: Options, work: Work) -> NoReturn:
    """Everything the child does; nothing of it returns into the command's frames."""
    status = 1
    try:
        _become_keeper(control)
        report = work(control, journal, connection, target, options)
        _say(control, {"report": report.to_json()})
        status = 0
    except TcpcpError as error:
        _say(control, {"failed": error.message, "hint": error.hint, "refusal": error.refusal})
    except Exception as error:  # noqa: BLE001 - a bug: the command says it, and the journal what became of the connection
        _say(control, {"crashed": f"{type(error).__name__}: {error}"[:500]})
    finally:
        os._exit(status)


def _become_keeper(control: socket.socket) -> None:
    """A session of its own: Ctrl-C in the terminal is the command's to understand. SIGTERM asks for the same."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def cancel(_number: int, _frame: FrameType | None) -> None:
        control.shutdown(socket.SHUT_RD)

    signal.signal(signal.SIGTERM, cancel)
    syscalls.name_process("tcpcp-keeper")
    syscalls.forbid_core_dumps()


def _say(control: socket.socket, what: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # the command has gone; the journal says it too
        control.send(json.dumps(what).encode(), socket.MSG_NOSIGNAL)


def run(control: socket.socket, journal: Journal, connection: Connection, target: Target | LocalTarget,
        options: Options) -> Report:
    """Stage the pass and run it to its end."""
    origin = Origin(journal, connection, target, options)
    executor = Executor(handoff.origin(), origin, ORIGIN_FINAL)
    try:
        try:
            _say(control, {"progress": f"connecting to {target}"})
            origin.there.connect()
            with netns.enter(origin.program.namespace), journal.claimed(origin.flow.to_json()):
                _say(control, {"progress": "staging"})
                origin.path = onward.path_from_here(origin.flow)
                origin.stage()
                origin.watch(control)
                with without_garbage_collection():
                    _say(control, {"progress": f"passing {origin.flow}"})
                    syscalls.go_first()
                    executor.run(Event.START)
        except TcpcpError as error:  # before the machine ran: nothing was touched
            executor.failure = executor.failure or error
        _tell_path(origin, executor.machine.state)
        carry_on(origin, executor)  # the last that the link is used for
        report = make_report(origin, executor)
        finish_journal(journal, executor)
        return report
    finally:
        with netns.enter(origin.program.namespace):
            origin.close()


def carry_on(origin: Origin, executor: Executor[OriginState]) -> None:
    """Where the packets of a pass that is done travel over its link, leave that to a process of its own."""
    if executor.machine.state is OriginState.DONE and carrying.is_wanted(origin.journal):
        try:
            with netns.enter(origin.program.namespace):
                carrier.begin(origin.journal, origin.flow, origin.there, origin.end_of_way)
        except TcpcpError as error:
            executor.left.append(f"carry: {error}")


def _tell_path(origin: Origin, state: OriginState) -> None:
    """Nothing comes to a destination that has the address itself by way of others, nor over another way than this link
    where that carries the packets."""
    plan, staged, there = origin.plan, origin.staged, origin.there
    if state is OriginState.DONE and origin.path and plan is not None and there.is_connected \
            and staged is not None and not staged.address_is_local and not carrying.is_wanted(origin.journal):
        origin.notes += onward.tell(origin.path, there.target, there.wire, origin.journal.pass_id, plan.via)


def finish_journal(journal: Journal, executor: Executor[OriginState]) -> None:
    """Of a pass that left nothing here, nothing is kept; by the record of one whose undoing failed, `release` finds
    its rules."""
    undone = not any(one.startswith(Action.UNDO.value) for one in executor.left)
    if executor.machine.state in (OriginState.READY, OriginState.ROLLED_BACK) and undone and journal.exists():
        journal.remove()


def make_report(origin: Origin, executor: Executor[OriginState]) -> Report:
    """The outcome in words: who owns the connection, and what to do about it."""
    state = executor.machine.state
    owner = OWNER[state]
    left, notes = list(executor.left), []
    steps = [("origin", name, ms) for name, ms in executor.steps]
    if origin.active is not None:
        steps += [("destination", str(name), float(ms)) for name, ms in origin.active.steps]
        left += [f"destination: {one}" for one in origin.active.left]
        notes += [*origin.notes, *map(str, origin.active.notes)]
    if origin.holding is not None and not origin.holding.queues and origin.touched:
        notes.append("this kernel cannot queue packets: what came meanwhile was dropped, and the peer sent it again")
    code, error, hint, refusal = ExitCode.OK, None, "", ""
    cause = _cause(origin, executor)
    if state in (OriginState.DONE, OriginState.LOST) and origin.journal.last() not in ("done", "lost"):
        left.append(f"the end could not be written: criu-tcpcp resolve {origin.journal.pass_id} tries it again")
    if state is OriginState.DONE:
        code = ExitCode.UNCLEAN if left else ExitCode.OK
        error = "; ".join(left) or None
    elif state in (OriginState.READY, OriginState.ROLLED_BACK):
        code = ExitCode.ROLLED_BACK if origin.touched else ExitCode.REFUSED
        outcome = "the pass was undone" if origin.touched else "nothing was touched"
        error, hint = f"{cause}; {outcome}, the origin process still has its connection", _hint(executor)
        refusal = executor.failure.refusal if executor.failure is not None else ""
    elif state is OriginState.LOST:
        code, owner, error = ExitCode.LOST, Owner.NONE, f"the connection is lost: {origin.last_reason or cause}"
    else:
        code = ExitCode.IN_DOUBT
        error = f"{cause}; the destination was told to take the connection and has not answered since"
        hint = f"when it can be reached again: criu-tcpcp resolve {origin.journal.pass_id}"
        if state is OriginState.LET_GO:
            notes.append("the origin process runs again, without this connection: it lives there, or nowhere")
    stall = origin.holding.duration_ms if origin.holding is not None else None
    plan = origin.plan
    return Report(
        id=origin.journal.pass_id, owner=owner, exit=code, connection=str(origin.flow),
        into=origin.staged.into if origin.staged else "",
        redirect=f"{plan.strategy} ({plan.reason})" if plan is not None else "", steps=tuple(steps),
        stall_ms=round(stall, 3) if stall is not None else None,
        left=tuple(left), notes=tuple(notes), error=error, hint=hint,
        refusal=refusal,
        details={"held_packets": origin.holding.packets if origin.holding is not None else 0,
                 "congestion": origin.options.congestion})


def _cause(origin: Origin, executor: Executor[OriginState]) -> str:
    failure = executor.failure
    if origin.last_reason and executor.machine.state is OriginState.ROLLED_BACK and failure is None:
        return f"the destination refused: {origin.last_reason}"
    if failure is None:
        return "it was cancelled"
    return failure.message


def _hint(executor: Executor[OriginState]) -> str:
    return executor.failure.hint if executor.failure is not None else ""
