"""The destination's side. It is started over SSH by `criu-tcpcp pass`, or by `criu-tcpcp dump` on the same host, and
speaks on stdin and stdout."""

from __future__ import annotations

import argparse
import sys

from ..core.errors import ExitCode, UsageError
from .arguments import descriptor, process_id

HELP = "the destination's side (started over SSH)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None are for people: `dump` says with them which directory takes the connection, and whose it was."""
    parser.add_argument("--images", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--pid", type=process_id, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=descriptor, action="append", default=[], help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    if sys.stdin.isatty():
        raise UsageError("serve speaks a protocol on stdin and stdout", hint="criu-tcpcp pass starts it over SSH")
    from .. import serve
    images = None
    if arguments.images is not None:
        from .. import imagedir
        from ..core.imageset import Owner
        images = serve.Images(imagedir.absolute(arguments.images), Owner(arguments.pid, "", tuple(arguments.fd)))
    serve.serve(images)
    return int(ExitCode.OK)
