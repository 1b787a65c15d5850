"""The destination's side. It is started over SSH by `criu-tcpcp pass`, or by `criu-tcpcp dump` on the same host, and
speaks on stdin and stdout."""

from __future__ import annotations

import argparse
import sys

from ..core.errors import ExitCode, UsageError
from .arguments import descriptor, process_id

HELP = "the destination's side (started over SSH)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The hidden ones are for `dump`: which directory takes the connection, and whose it was."""
    parser.add_argument("--policy", metavar="FILE", help="obey this policy: for a forced command of sshd")
    parser.add_argument("--key", metavar="NAME", help="what the policy calls the key that this command is forced upon")
    parser.add_argument("--images", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--pid", type=process_id, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=descriptor, action="append", default=[], help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    if (arguments.policy is None) != (arguments.key is None) or (arguments.policy and arguments.images):
        raise UsageError("--policy and --key go together", hint="serve --policy FILE --key NAME")
    if sys.stdin.isatty():
        if arguments.policy is not None:
            from ..door import Door
            Door(arguments.policy, arguments.key)  # for its complaint
        raise UsageError("serve speaks a protocol on stdin and stdout", hint="criu-tcpcp pass starts it over SSH")
    from .. import serve
    images, door = None, None
    if arguments.policy is not None:
        from ..door import open_door
        door = open_door(arguments.policy, arguments.key)
    if arguments.images is not None:
        from .. import imagedir
        from ..core.imageset import Owner
        images = serve.Images(imagedir.absolute(arguments.images), Owner(arguments.pid, "", tuple(arguments.fd)))
    serve.serve(images, door)
    return int(ExitCode.OK)
