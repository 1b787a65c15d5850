"""List the connections in CRIU images.

They are in a directory, by `criu-tcpcp dump` or `criu dump`, or in a container engine's checkpoint archive (podman)."""

from __future__ import annotations

import argparse
import base64
from typing import Any

from ..core.errors import ExitCode, Refused
from . import console

HELP = "list the connections in CRIU images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("-D", "--images-dir", metavar="DIR", dest="directory",
                       help="a directory of images, by criu-tcpcp dump or criu dump")
    place.add_argument("archive", metavar="ARCHIVE", nargs="?",
                       help="a checkpoint archive, as `podman container checkpoint --export` writes it")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--payload", action="store_true",
                        help="also what is in the queues, and what the application handed over (JSON: in base64)")


def run(arguments: argparse.Namespace) -> int:
    from .. import imagedir
    from ..core import imageset
    from ..core.errors import ProtocolError
    from ..pipeline import archive
    try:
        files = archive.read(arguments.archive) if arguments.archive else imagedir.read(arguments.directory)
        found = imageset.read(files)
    except ProtocolError as error:
        raise Refused(f"{arguments.archive or arguments.directory}: {error.message}",
                      hint="-D names a directory of criu-tcpcp dump, or of criu dump --tcp-established") from None
    if arguments.json:
        about = imageset.about(files)
        for one in found:
            console.result_json(_object(one, about, payload=arguments.payload))
        return int(ExitCode.OK)
    rows = [["State", "Recv-Q", "Send-Q", "Local Address:Port", "Peer Address:Port", "Process", "FD", "Inode",
             "Images"]]
    rows += [[one.state, *([str(len(one.received)), str(len(one.outgoing))] if one.stream else ["-", "-"]),
              str(one.flow.local) if one.flow else "*", str(one.flow.peer) if one.flow else "*",
              ",".join(_name(owner) for owner in one.owners) or "-",
              ",".join(sorted({str(number) for owner in one.owners for number in owner.descriptors})) or "-",
              str(one.inode), one.problem or ("whole" if one.whole else "CRIU's")] for one in found]
    console.table(rows)
    if arguments.payload:
        for one in found:
            for name, data in _payload(one).items():
                console.result(f"{one.flow or one.inode} {name}: {data!r}")
    return int(ExitCode.OK)


def _name(owner: Any) -> str:
    """CRIU's images of descriptors tell no name."""
    return f"{owner.process}({owner.pid})" if owner.process else str(owner.pid)


def _payload(one: Any) -> dict[str, bytes]:
    return {"received": one.received, "outgoing": one.outgoing, "app_state": one.app_state}


def _object(one: Any, about: dict[str, Any], *, payload: bool) -> dict[str, Any]:
    stream = None
    if one.stream is not None:
        stream = {field.name: getattr(one.stream, field.name) for field in one.stream.DESCRIPTOR.fields
                  if one.stream.HasField(field.name)}
    shown = {"schema": 1, "inode": one.inode, "state": one.state,
             "local": str(one.flow.local) if one.flow else None, "peer": str(one.flow.peer) if one.flow else None,
             "processes": [{"pid": owner.pid, "process": owner.process or None, "fds": list(owner.descriptors)}
                           for owner in one.owners],
             "recv_q": len(one.received), "send_q": len(one.outgoing), "app_state": len(one.app_state),
             "stream": stream, "whole": one.whole, "problem": one.problem or None, "dump": about or None}
    if payload:
        shown["payload"] = {name: base64.b64encode(data).decode() for name, data in _payload(one).items()}
    return shown
