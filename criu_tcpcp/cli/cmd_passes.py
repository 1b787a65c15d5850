"""List the passes that this host knows of, and what of each still stands."""

from __future__ import annotations

import argparse

from ..core.errors import ExitCode
from . import console
from .arguments import need_root

HELP = "list passes, and what of each still stands"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(arguments: argparse.Namespace) -> int:
    need_root()
    from .. import settle
    known = settle.passes()
    if arguments.json:
        for one in known:
            console.result_json(one.to_json())
        return int(ExitCode.OK)
    rows = [["ID", "Side", "State", "Connection", "Other host", "Rules", "Carrier"]]
    rows += [[one.id, one.side, one.state, one.connection, one.other_host or "-", ",".join(one.rules) or "-",
              "-" if one.carrier is None else str(one.carrier or "none")]
             for one in known]
    console.table(rows)
    return int(ExitCode.OK)
