"""`python -m criu_tcpcp.lab`: a lab to look around in.

    up                 build one, say how to reach its hosts, keep it until Ctrl-C
    shell HOST         a shell on one of its hosts
    exec HOST -- CMD   a command there; its exit status is ours

`shell` and `exec` use the lab that is up, if there is exactly one, or else build one for as long as they last.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from criu_tcpcp.core.errors import KernelError

from .lab import Lab


def main() -> int:
    arguments = _parser().parse_args()
    try:
        if arguments.action == "up":
            return _up()
        with _lab() as lab:
            if arguments.host not in lab.hosts:
                print(f"no host {arguments.host}; there are: {' '.join(lab.hosts)}", file=sys.stderr)
                return 2
            host = lab.hosts[arguments.host]
            if arguments.action == "exec":
                return _status(host.spawn(arguments.command).wait())
            print(_facts(lab), file=sys.stderr)
            # Ctrl-C is the shell's. A handler, not SIG_IGN, which every program in the shell would inherit.
            signal.signal(signal.SIGINT, lambda number, frame: None)
            shell = os.environ.get("SHELL", "/bin/bash")
            return _status(host.spawn([shell], env={"debian_chroot": host.name}).wait())
    except (OSError, KernelError, RuntimeError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m criu_tcpcp.lab", description="hosts in network namespaces")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("up", help="build a lab and keep it until Ctrl-C")
    shell = actions.add_parser("shell", help="a shell on a host")
    shell.add_argument("host")
    run = actions.add_parser("exec", help="a command on a host")
    run.add_argument("host")
    run.add_argument("command", nargs="+", metavar="CMD")
    return parser


def _up() -> int:
    with Lab(joinable=True) as lab:
        _start_servers(lab)
        print(_facts(lab), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                signal.pause()
    return 0


@contextlib.contextmanager
def _lab() -> Iterator[Lab]:
    """The lab that is up, if there is exactly one, else one of our own."""
    try:
        lab = Lab.join()
    except LookupError:
        with Lab() as own:
            _start_servers(own)
            yield own
    else:
        yield lab


def _start_servers(lab: Lab) -> None:
    lab.origin.start_sshd()
    lab.destination.start_sshd()


def _facts(lab: Lab) -> str:
    lines = [f"directory  {lab.directory}"]
    for host in lab.hosts.values():
        lines.append(f"{host.name:12} {host.ipv4!s:12} {host.ipv6!s:16} {host.netns}  {host.run_dir}")
    lines += ["on one host, another by SSH:",
              f"  ip netns exec {lab.origin.netns.name} ssh -F {lab.ssh.config} destination",
              "on a host:",
              *(f"  {sys.executable} -m criu_tcpcp.lab shell {name}" for name in lab.hosts)]
    return "\n".join(lines)


def _status(returncode: int) -> int:
    """As a shell has it: 128 and the signal's number for a death by signal."""
    return returncode if returncode >= 0 else 128 - returncode


if __name__ == "__main__":
    sys.exit(main())
