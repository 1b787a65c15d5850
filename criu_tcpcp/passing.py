"""`pass`: one connection, from the request to the report.

What can be refused without touching anything is refused here or in the staging; the keeper does the rest, and this
waits for what it says. Should the keeper be killed, the journal tells what became of the connection: before the offer
the kernel has given it back by itself, after it the pass is settled here as `resolve` would.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
from collections.abc import Callable, Container
from typing import Any

from . import graft, inventory, journal, keeper, redirect, settle
from .core.criu import messages as load_criu_messages
from .core.errors import ExitCode, Owner, Refused, TcpcpError, UsageError
from .core.messages import MAX_PROLOGUE
from .core.refusals import Refusal
from .inventory import Connection
from .journal import Journal
from .kernel import netns, process, tcpinfo
from .origin import Options, Origin
from .redirect import returned
from .report import PassError, Report
from .transport.target import LocalTarget, Target, parse_host

CONGESTION = ("keep", "restart")

Progress = Callable[[str], None]


def check(pid: int, fd: int, allowing: Container[Refusal] = ()) -> Connection:
    """The connection, if this host could pass it. Refused with the reason; nothing is touched. `allowing`: what the
    user takes all the same."""
    if os.geteuid() != 0:
        raise Refused("root is needed (CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_PTRACE)", hint="run it with sudo")
    if pid == os.getpid():
        raise Refused("a process cannot pass its own connection through this call", hint="run criu-tcpcp beside it")
    connection = inventory.find(pid, fd, allowing)
    inventory.refuse_local_peer(connection)
    load_criu_messages()
    return connection


def check_options(options: dict[str, Any]) -> Options:
    """UsageError for what can be no option of any pass, before anything is looked at."""
    try:
        wanted = Options(**options)
    except TypeError as error:
        raise UsageError(str(error)) from None
    graft.check_name(wanted.into)
    if wanted.congestion not in CONGESTION:
        raise UsageError(f"--congestion {wanted.congestion[:80]}: keep or restart")
    redirect.check_name(wanted.redirect)
    returned.check_name(wanted.returns)
    if wanted.leave_behind and wanted.redirect != "address":
        raise UsageError("--leave-behind speaks of an address that moves", hint="--redirect address")
    if wanted.returns != "direct" and wanted.redirect == "address":
        raise UsageError("--return origin: where the address moves, nothing is foreign that the destination says",
                         hint="leave --return away, or --redirect auto")
    if wanted.prologue is not None:
        if len(wanted.prologue) > MAX_PROLOGUE:
            raise UsageError(f"the prologue has {len(wanted.prologue)} bytes: at most {MAX_PROLOGUE} can be said")
        if wanted.into.startswith(("receiver", "pid:")):
            raise UsageError(f"--into {wanted.into[:80]} takes no prologue: it is said to a server that accepts",
                             hint="--into accept:PID or listen:PORT; a receiver gets --app-state")
    if wanted.via is not None:
        try:
            ipaddress.ip_address(wanted.via.split("%")[0])
        except ValueError:
            raise UsageError(f"--via {wanted.via[:80]!r} is not an IP address") from None
    return wanted


def preview(connection: Connection, target: Target | LocalTarget, options: dict[str, Any]) -> dict[str, str]:
    """What a pass would use: reaches the destination and stages there and here, stops nothing, and takes all back."""
    record = Journal(journal.new_id(), journal.ORIGIN)
    origin = Origin(record, connection, target, check_options(options))
    try:
        origin.there.connect()
        with netns.enter(origin.program.namespace):
            origin.stage()
            origin.unstage()
        plan, staged, hello = origin.plan, origin.staged, origin.there.hello
        return {"destination": f"{hello.host} (criu-tcpcp {hello.version})" if hello else "",
                "into": staged.into if staged else "",
                "redirect": f"{plan.strategy}: {plan.reason}" if plan else "",
                "congestion": f"{origin.options.congestion} ({tcpinfo.learnt(origin.program.need_socket())} so far)",
                "packets": "held" if origin.holding and origin.holding.queues
                else "dropped during the pass: this kernel cannot queue them"}
    finally:
        with netns.enter(origin.program.namespace):
            origin.close()


def pass_connection(pid: int, fd: int, host: str | Target | LocalTarget, *, progress: Progress | None = None,
                    **options: Any) -> Report:
    """Pass the connection behind descriptor `fd` of process `pid` to `host` ("[USER@]HOST[:PORT]", or a Target).

    `options` are the fields of `origin.Options`. Blocks until the pass is settled. Raises PassError (`.owner`,
    `.exit_code`, `.report`) unless the connection lives at the destination and all is done.
    """
    try:
        target = parse_host(host) if isinstance(host, str) else host
        wanted = check_options(options)
        connection = check(pid, fd, wanted.allowing)
        journal.prepare_run_directory()
        report = run_keeper(Journal(journal.new_id(), journal.ORIGIN), connection, target, wanted, progress)
    except PassError:
        raise
    except TcpcpError as error:
        raise PassError(refused(pid, fd, error)) from error
    if report.exit is not ExitCode.OK:
        raise PassError(report)
    return report


def refused(pid: int, fd: int, error: TcpcpError) -> Report:
    """The report of what was refused before it had an id."""
    return Report(id="", owner=error.owner, exit=error.exit_code, connection=f"process {pid}, descriptor {fd}",
                  error=error.message, hint=error.hint, refusal=error.refusal)


def run_keeper(record: Journal, connection: Connection, target: Target | LocalTarget, options: Options,
               progress: Progress | None, work: keeper.Work | None = None) -> Report:
    """Let a keeper do it, and wait for what comes of it; where the keeper is killed, settle what it has left."""
    pid, control = keeper.start(record, connection, target, options, work)
    with control:
        try:
            said = _listen(control, progress)
        except Refused as error:
            if record.last() not in (*journal.UNSETTLED, "done", "lost"):
                raise
            said = f"the keeper failed: {error.message}"
    os.waitpid(pid, 0)
    if isinstance(said, str):
        return _after_keeper(record, connection, progress, said)
    return said


def _listen(control: socket.socket, progress: Progress | None) -> Report | str:
    """What the keeper says until it ends; Ctrl-C asks it to undo, and waits on. Where it ended without a report, what
    became of it."""
    while True:
        try:
            data = control.recv(1 << 20)
        except KeyboardInterrupt:
            with contextlib.suppress(BrokenPipeError):  # it has ended just now
                control.send(b"cancel")
            continue
        except ConnectionResetError:  # it ended without reading that; what it said before is still to be read
            continue
        if not data:
            return "the keeper was killed"
        said = json.loads(data)
        if "report" in said:
            return Report.from_json(said["report"])
        if "failed" in said:
            raise Refused(said["failed"], hint=said["hint"], refusal=said["refusal"])
        if "crashed" in said:
            return f"internal error in the keeper, please report it: {said['crashed']}"
        if progress is not None:
            progress(said["progress"])


def _after_keeper(record: Journal, connection: Connection, progress: Progress | None, why: str) -> Report:
    """The keeper is gone. What it wrote last says whether the connection may still be the origin's."""
    if record.last() in journal.UNSETTLED:
        if progress is not None:
            progress(f"{why}; settling the pass")
        return settle.resolve(record.pass_id)
    if record.last() in ("done", "lost"):
        return settle.resolve(record.pass_id)
    if record.exists():
        with contextlib.suppress(TcpcpError):
            settle.tell_network(record)
        record.remove()
    settle.sweep_host()
    with contextlib.suppress(TcpcpError), netns.enter(process.network_namespace(connection.pid)):
        settle.sweep_rules()
    return Report(id=record.pass_id, owner=Owner.ORIGIN, exit=ExitCode.ROLLED_BACK, connection=str(connection.flow),
                  error=f"{why} before the offer; the origin process has its connection")
