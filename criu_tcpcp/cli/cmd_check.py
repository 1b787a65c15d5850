"""Can this host pass connections, and can that one take them?"""

from __future__ import annotations

import argparse

from ..core.errors import ExitCode
from . import console
from .arguments import add_ssh_arguments, target_of

HELP = "can this host, and that one, do it?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", metavar="[USER@]HOST[:PORT]", help="ask this host too")
    parser.add_argument("--feature", metavar="NAME", help="only this one; its exit status answers")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_ssh_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from .. import features
    found = features.check(arguments.feature)
    reached = features.check_host(target_of(arguments)) if arguments.host is not None else None
    bad = [one for one in found if one.problem and (one.required or arguments.feature)]
    if arguments.json:
        console.result_json({"schema": 1, "features": [one.to_json() for one in found], "host": reached})
    else:
        for one in found:
            console.result(f"  {'ok  ' if not one.problem else 'FAIL' if one.required else 'lack'}  {one.name}: "
                           f"{one.problem or one.meaning}")
        if reached is not None:
            console.result(f"  reached  {arguments.host}: criu-tcpcp {reached['version']} on {reached['host']}")
        if not bad:
            console.result("Looks good.")
    return int(ExitCode.REFUSED if bad else ExitCode.OK)
