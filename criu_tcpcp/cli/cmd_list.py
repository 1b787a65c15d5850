"""List connections, and whether each can be passed, or why not."""

from __future__ import annotations

import argparse
import gc
from typing import Any

from ..core.errors import ExitCode
from . import console
from .arguments import need_root, process_id

HELP = "list connections, and whether each can be passed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pid", type=process_id, help="only this process")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(arguments: argparse.Namespace) -> int:
    need_root()
    from .. import inventory
    if arguments.pid is not None:
        from ..kernel import process
        process.identity(arguments.pid)
    gc.disable()  # of thousands of connections, none is garbage
    found = sorted(inventory.connections(arguments.pid), key=lambda one: (one.pid, one.descriptors))
    if arguments.json:
        console.results_json(map(_object, found))
        return int(ExitCode.OK)
    rows = [["Netid", "State", "Recv-Q", "Send-Q", "Local Address:Port", "Peer Address:Port", "Process", "FD",
             "Passable"]]
    rows += [[one.protocol.label, one.state_label, str(one.unread), str(one.unacknowledged),
              str(one.flow.local) if one.flow else "*", str(one.flow.peer) if one.flow else "*",
              f"{one.process_name}({one.pid})", ",".join(map(str, one.descriptors)),
              f"no: {one.obstacle.what}" if one.obstacle else "yes"] for one in found]
    console.table(rows)
    return int(ExitCode.OK)


def _object(one: Any) -> dict[str, Any]:
    return {"pid": one.pid, "process": one.process_name, "fds": list(one.descriptors),
            "protocol": one.protocol.label, "state": one.state_label,
            "local": str(one.flow.local) if one.flow else None, "peer": str(one.flow.peer) if one.flow else None,
            "recv_q": one.unread, "send_q": one.unacknowledged, "passable": one.obstacle is None,
            "refusal": one.obstacle.refusal if one.obstacle else None,
            "why_not": one.obstacle.what if one.obstacle else None, "hint": one.obstacle.hint if one.obstacle else "",
            "shared_with": list(one.shared_with)}
