"""Can this host pass connections, and can that one take them?"""

from __future__ import annotations

import argparse
from typing import Any

from ..core.errors import ExitCode
from . import console
from .arguments import add_ssh_arguments, target_of

HELP = "can this host, and that one, do it?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", metavar="[USER@]HOST[:PORT]", help="let this host try it too")
    parser.add_argument("--feature", metavar="NAME", help="only this one; the exit status answers")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_ssh_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from .. import features
    target = target_of(arguments) if arguments.host is not None else None
    here = features.check(arguments.feature)
    there = features.check_host(target, arguments.feature) if target is not None else None
    found = [*here, *(there.features if there is not None else ())]
    bad = [one for one in found if one.problem and (one.required or arguments.feature)]
    if arguments.json:
        console.result_json({"schema": 1, "exit": int(ExitCode.REFUSED if bad else ExitCode.OK),
                             "features": [one.to_json() for one in here],
                             "host": there.to_json() if there is not None else None})
    else:
        _print(here)
        if there is not None:
            console.result(f"{arguments.host}: criu-tcpcp {there.version} on {there.host}")
            _print(there.features)
        if not bad:
            console.result("Looks good.")
    return int(ExitCode.REFUSED if bad else ExitCode.OK)


def _print(found: Any) -> None:
    for one in found:
        console.result(f"  {'ok  ' if not one.problem else 'FAIL' if one.required else 'lack'}  {one.name}: "
                       f"{one.problem or one.meaning}")
