"""Options that several commands share."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from ..core.errors import Refused

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


def process_id(text: str) -> int:
    """For argparse: a number that a process can have (PID_MAX_LIMIT, linux/threads.h)."""
    return _number(text, 1, 1 << 22)


def descriptor(text: str) -> int:
    """For argparse."""
    return _number(text, 0, (1 << 31) - 1)


def _number(text: str, lowest: int, highest: int) -> int:
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
