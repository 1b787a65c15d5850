"""Take away the rules and records of finished passes."""

from __future__ import annotations

import argparse

from ..core.errors import ExitCode
from . import console
from .arguments import need_root

HELP = "drop the fences, redirects and records of finished passes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", nargs="?", help="one pass (default: all that are finished)")
    parser.add_argument("--force", action="store_true",
                        help="also where the other host has not confirmed the end of a pass, and may never do so")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    need_root()
    from .. import settle
    outcome = settle.release(arguments.id, force=arguments.force)
    if arguments.json:
        console.result_json({"schema": 1, "released": list(outcome.released), "kept": list(outcome.kept)})
    else:
        for one in outcome.released:
            console.result(f"released {one}")
        for one in outcome.kept:
            console.result(f"kept {one}")
        if not outcome.released and not outcome.kept:
            console.result("nothing to release")
    if arguments.id and outcome.kept:
        return int(ExitCode.IN_DOUBT if outcome.in_doubt else ExitCode.REFUSED)
    return int(ExitCode.OK)
