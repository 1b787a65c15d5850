"""Pass a connection of a process on this host (the origin) to a process on another (the destination)."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from ..core.errors import ExitCode, UsageError
from ..core.messages import MAX_PROLOGUE
from ..core.state import MAX_CARRIED
from . import console
from .arguments import add_freeze_arguments, add_ssh_arguments, descriptor, freeze_options, process_id, target_of

HELP = "pass a connection to another host"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pid", type=process_id, required=True, help="the process that has the connection")
    parser.add_argument("--fd", type=descriptor, required=True, help="its descriptor")
    parser.add_argument("--host", required=True, metavar="[USER@]HOST[:PORT]", help="the destination")
    parser.add_argument("--into", default="auto", metavar="WAY",
                        help="who takes the connection there: auto, receiver[:PATH], accept:PID, listen:PORT or "
                             "pid:PID[:FD] (default: %(default)s)")
    parser.add_argument("--redirect", default="auto", metavar="WAY",
                        help="how later packets get there: auto, none, forward, carry, address or hook:CMD (default: "
                             "%(default)s)")
    parser.add_argument("--leave-behind", action="store_true",
                        help="let the address move (--redirect address) though other sockets of this host use it, "
                             "which lose it")
    parser.add_argument("--via", metavar="ADDRESS", help="the destination's address for packets (default: as SSH)")
    parser.add_argument("--return", dest="returns", default="direct", metavar="WAY",
                        help="how what the destination says gets to the peer: direct, or by way of the origin, for "
                             "networks that filter foreign sources (default: %(default)s)")
    add_freeze_arguments(parser)
    parser.add_argument("--congestion", default="keep", choices=["keep", "restart"],
                        help="go on with the congestion window and round trip that were learnt of the path, or as a "
                             "new connection does (default: %(default)s)")
    parser.add_argument("--doubt-limit", type=float, default=5, metavar="S",
                        help="where the destination does not answer the offer: let the process run again, without the "
                             "connection, after this time (default: %(default)s)")
    parser.add_argument("--app-state", metavar="FILE|-", help="bytes for the application at the destination")
    parser.add_argument("--prologue", metavar="FILE|-",
                        help="bytes that an unmodified server there reads before the peer's; its answers are dropped")
    parser.add_argument("--tls-anyway", action="store_true",
                        help="pass what looks like TLS to an unmodified program, too, which does not have its keys")
    parser.add_argument("--ecn-anyway", action="store_true",
                        help="pass a connection that negotiated ECN, too; it goes on without")
    parser.add_argument("--dry-run", action="store_true",
                        help="reach the destination, stage everything, stop nothing, and take it all back")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("-v", "--verbose", action="store_true", help="the time of every step")
    add_ssh_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from .. import passing
    from ..report import PassError
    target = target_of(arguments)
    if arguments.app_state == arguments.prologue == "-":
        raise UsageError("--app-state and --prologue cannot both be read from stdin")
    options = _options(arguments)
    if arguments.dry_run:
        return _dry_run(arguments, options)
    try:
        report = passing.pass_connection(arguments.pid, arguments.fd, target, progress=console.progress, **options)
    except PassError as error:
        if arguments.verbose and not arguments.json:
            console.steps(error.report)
        raise
    if arguments.json:
        console.result_json(report.to_json())
    else:
        _print(report, arguments.verbose)
    return int(report.exit)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"into": arguments.into, "redirect": arguments.redirect, "via": arguments.via,
            "leave_behind": arguments.leave_behind, "returns": arguments.returns,
            "app_state": _bytes("--app-state", arguments.app_state, MAX_CARRIED, "256 MiB") or b"",
            "tls_anyway": arguments.tls_anyway, "ecn_anyway": arguments.ecn_anyway,
            "prologue": _bytes("--prologue", arguments.prologue, MAX_PROLOGUE, "32 KiB"),
            "congestion": arguments.congestion,
            "doubt_limit_s": _not_negative("--doubt-limit", arguments.doubt_limit), **freeze_options(arguments)}


def _not_negative(name: str, value: float) -> float:
    if not 0 <= value < 1e9:
        raise UsageError(f"{name} {value:g} is not a number of seconds")
    return value


def _bytes(option: str, name: str | None, limit: int, limit_text: str) -> bytes | None:
    """What the option's file holds; None without the option."""
    if name is None:
        return None
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin.buffer if name == "-" else stack.enter_context(Path(name).open("rb"))
            data = file.read(limit + 1)
    except OSError as error:
        raise UsageError(f"{option} {name}: {error.strerror}") from None
    if len(data) > limit:
        raise UsageError(f"{option} {name}: more than {limit_text}")
    return data


def _dry_run(arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    """What this host can tell beforehand; the destination is reached and asked, and nothing is stopped there or
    here."""
    from .. import passing
    from ..core import handoff
    wanted = passing.check_options(options)
    connection = passing.check(arguments.pid, arguments.fd, wanted.allowing)
    preview = passing.preview(connection, target_of(arguments), options)
    actions = [action.value for transition in (
        handoff.ORIGIN[handoff.OriginState.READY, handoff.Event.START],
        handoff.ORIGIN[handoff.OriginState.PREPARED, handoff.Event.PREPARED],
        handoff.ORIGIN[handoff.OriginState.OFFERING, handoff.Event.DONE],
        handoff.ORIGIN[handoff.OriginState.OFFERED, handoff.Event.COMMITTED]) for action in transition.actions]
    if arguments.json:
        console.result_json({"schema": 1, "connection": str(connection.flow), "actions": actions, **preview})
    else:
        console.result(f"{connection.flow}, {connection.state.label}: can be passed")
        for name, value in preview.items():
            console.result(f"  {name}: {value}")
        console.result("  steps: " + ", ".join(actions))
    return int(ExitCode.OK)


def _print(report: Any, verbose: bool) -> None:
    console.result(f"passed {report.connection}")
    console.result(f"  into: {report.into}")
    console.result(f"  redirect: {report.redirect}")
    if report.stall_ms is not None:
        console.result(f"  packets of the peer were held for {report.stall_ms:.1f} ms")
    for note in report.notes:
        console.result(f"  note: {note}")
    if verbose:
        console.steps(report)
