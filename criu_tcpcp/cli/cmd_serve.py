"""The destination's side. It is started over SSH by `criu-tcpcp pass` and speaks on stdin and stdout."""

from __future__ import annotations

import argparse
import sys

from ..core.errors import ExitCode, UsageError

HELP = "the destination's side (started over SSH)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(arguments: argparse.Namespace) -> int:
    if sys.stdin.isatty():
        raise UsageError("serve speaks a protocol on stdin and stdout", hint="criu-tcpcp pass starts it over SSH")
    from .. import serve
    serve.serve()
    return int(ExitCode.OK)
