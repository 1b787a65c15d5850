"""Options that several commands share."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

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


def target_of(arguments: argparse.Namespace) -> Target:
    """The destination that --host and the SSH options name. UsageError for what cannot be."""
    from ..transport.target import parse_host
    return replace(parse_host(arguments.host), identity_files=tuple(arguments.identity),
                   ssh_config=arguments.ssh_config, known_hosts=arguments.known_hosts,
                   remote_command=arguments.remote_command,
                   timeout_s=arguments.timeout)
