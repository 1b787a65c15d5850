"""Settle passes in doubt: ask the destination what became of them."""

from __future__ import annotations

import argparse

from ..core.errors import ExitCode, TcpcpError, UsageError
from . import console
from .arguments import need_root, seconds

HELP = "settle passes in doubt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", nargs="?", help="the pass (default: all that are in doubt)")
    parser.add_argument("--force-origin", action="store_true",
                        help="take the connection back without the destination's word: if it did take it, two hosts "
                             "speak for it from then on")
    parser.add_argument("--timeout", type=seconds, default=10, metavar="S",
                        help="how long to ask the destination (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a pass")


def run(arguments: argparse.Namespace) -> int:
    need_root()
    from .. import settle
    if arguments.force_origin and arguments.id is None:
        raise UsageError("--force-origin needs the id of one pass")
    if arguments.force_origin and settle.is_in_doubt(arguments.id):
        console.log("warning: taking the connection back without the destination's word; if it has committed, the "
                    "peer will hear two hosts and may reset the connection")
    ids = [arguments.id] if arguments.id else [journal.pass_id for journal in settle.unsettled()]
    if arguments.id is None:
        settle.sweep_host()
    codes = set()
    for pass_id in ids:
        try:
            report = settle.resolve(pass_id, settle_s=arguments.timeout, force_origin=arguments.force_origin)
        except TcpcpError as error:
            if arguments.id:
                raise
            if arguments.json:  # the others are settled all the same
                console.result_json({"schema": 1, "id": pass_id, "exit": int(error.exit_code),
                                     "owner": error.owner.value, "error": error.message, "hint": error.hint})
            else:
                console.error(error, about_connection=False)
            codes.add(error.exit_code)
            continue
        codes.add(report.exit)
        if arguments.json:
            console.result_json(report.to_json())
        else:
            console.result(f"{report.id}: {report.owner.value}" + (f": {report.error}" if report.error else ""))
    if not ids and not arguments.json:
        console.result("no pass is in doubt")
    # A settled pass whose connection came back is a success of `resolve`, but its status still tells the owner.
    if len(codes) > 1:
        return int(ExitCode.MIXED)
    return int(codes.pop()) if codes else int(ExitCode.OK)
