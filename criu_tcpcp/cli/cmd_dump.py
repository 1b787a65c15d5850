"""Write the state of a connection into a directory of CRIU images.

With -R the process keeps its connection; otherwise the connection ends here in silence, and lives in the directory."""

from __future__ import annotations

import argparse
from typing import Any

from . import console
from .arguments import add_freeze_arguments, descriptor, freeze_options, process_id

HELP = "write a connection's state into CRIU images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pid", type=process_id, required=True, help="the process that has the connection")
    parser.add_argument("--fd", type=descriptor, required=True, help="its descriptor")
    parser.add_argument("-D", "--images-dir", required=True, metavar="DIR", dest="directory",
                        help="where the images go: a directory that is new, or empty")
    parser.add_argument("-R", "--leave-running", action="store_true", help="the process keeps its connection")
    add_freeze_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("-v", "--verbose", action="store_true", help="the time of every step")


def run(arguments: argparse.Namespace) -> int:
    options = freeze_options(arguments)
    from .. import dump
    from ..report import PassError
    try:
        report = dump.dump_connection(arguments.pid, arguments.fd, arguments.directory,
                                      leave_running=arguments.leave_running, progress=console.progress, **options)
    except PassError as error:
        if arguments.verbose and not arguments.json:
            console.steps(error.report)
        raise
    if arguments.json:
        console.result_json(report.to_json())
    else:
        _print(report, arguments)
    return int(report.exit)


def _print(report: Any, arguments: argparse.Namespace) -> None:
    console.result(f"dumped {report.connection}")
    console.result(f"  into: {report.into}")
    if not arguments.leave_running:
        console.result("  the connection has ended here in silence; a fence keeps this host from answering the peer: "
                       f"criu-tcpcp release {report.id} drops it")
    if report.stall_ms is not None:
        console.result(f"  packets of the peer were held for {report.stall_ms:.1f} ms")
    for note in report.notes:
        console.result(f"  note: {note}")
    if arguments.verbose:
        console.steps(report)
