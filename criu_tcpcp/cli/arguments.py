"""Options that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..core.errors import Refused, UsageError

if TYPE_CHECKING:
    from ..transport.target import Target


def add_ssh_arguments(parser: argparse.ArgumentParser) -> None:
    """How the other host is reached."""
    ssh = parser.add_argument_group("SSH")
    ssh.add_argument("-i", dest="identity", action="append", default=[], metavar="KEY", help="private key file")
    ssh.add_argument("-F", dest="ssh_config", metavar="SSH_CONFIG", help="configuration file instead of ~/.ssh/config")
    ssh.add_argument("--known-hosts", metavar="FILE", help="known host keys instead of ~/.ssh/known_hosts")
    ssh.add_argument("--remote-command", default="criu-tcpcp", metavar="CMD",
                     help="shell command line there, to which ' serve' is appended (default: %(default)s)")
    ssh.add_argument("--timeout", type=float, default=10, metavar="S", help="for the connection (default: %(default)s)")


def add_freeze_arguments(parser: argparse.ArgumentParser) -> None:
    """When the program may be stopped, for how long, and what it sees afterwards."""
    parser.add_argument("--when", default="idle", metavar="now|idle[:MS]",
                        help="take any instant, or wait up to MS (200) for one at which the program is quiet")
    parser.add_argument("--max-stall", type=int, default=500, metavar="MS",
                        help="give the connection back when it takes longer than this before the offer (default: "
                             "%(default)s)")
    parser.add_argument("--origin-sees", default="reset", choices=["reset", "eof"],
                        help="what the origin program reads afterwards (default: %(default)s)")


def freeze_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those as fields of `origin.Options`. UsageError for what makes no sense."""
    if arguments.max_stall <= 0:
        raise UsageError(f"--max-stall {arguments.max_stall} is no time at all")
    return {"idle_ms": _idle_ms(arguments.when), "max_stall_ms": arguments.max_stall,
            "origin_sees": arguments.origin_sees}


def _idle_ms(text: str) -> int | None:
    if text == "now":
        return None
    kind, _, number = text.partition(":")
    if kind != "idle" or (number and not (number.isascii() and number.isdigit())) or text.endswith(":"):
        raise UsageError(f"--when {text!r}: now, idle, or idle:MS")
    return int(number) if number else 200


def seconds(text: str) -> float:
    """For argparse: at most a day."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 86400:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a number of seconds from 0 to 86400")


def process_id(text: str) -> int:
    """For argparse: a number that a process can have (PID_MAX_LIMIT, linux/threads.h)."""
    return number(text, 1, 1 << 22)


def descriptor(text: str) -> int:
    """For argparse."""
    return number(text, 0, (1 << 31) - 1)


def number(text: str, lowest: int, highest: int) -> int:
    """For argparse's types: a whole number within bounds."""
    if not (text.isascii() and text.isdigit() and len(text) < 11 and lowest <= int(text) <= highest):
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a number from {lowest} to {highest}")
    return int(text)


def need_root() -> None:
    """An answer that is empty for want of privileges would be a wrong one."""
    if os.geteuid() != 0:
        raise Refused("root is needed", hint="run it with sudo")


def target_of(arguments: argparse.Namespace) -> Target:
    """The destination that --host and the SSH options name. UsageError for what cannot be."""
    from ..transport.target import parse_host
    return replace(parse_host(arguments.host), identity_files=tuple(arguments.identity),
                   ssh_config=arguments.ssh_config, known_hosts=arguments.known_hosts,
                   remote_command=arguments.remote_command,
                   timeout_s=arguments.timeout)
