"""To pass a connection with a bug on purpose (tests/sabotage/sitecustomize.py, where the bugs are told).

    options, environment = sabotaged("lost-byte")
    here.pass_once(*options, env=environment)
"""

from __future__ import annotations

import shlex
from pathlib import Path

from world import COMMAND

AT_DESTINATION = ("tsval-back", "tsecr-zero", "lost-byte", "shrunk-window")
AT_ORIGIN = ("origin-rst", "origin-speaks")
BUGS = (*AT_DESTINATION, *AT_ORIGIN)
_DIRECTORY = Path(__file__).parent / "sabotage"


def environment(bug: str) -> dict[str, str]:
    """What makes a Python program run with the bug."""
    assert bug in BUGS, bug
    return {"PYTHONPATH": str(_DIRECTORY), "CRIU_TCPCP_SABOTAGE": bug}


def remote_command(bug: str) -> str:
    """For --remote-command: the destination's half of the tool, with the bug."""
    return shlex.join(["env", *(f"{name}={value}" for name, value in environment(bug).items()), COMMAND])


def sabotaged(bug: str) -> tuple[list[str], dict[str, str]]:
    """(options of `pass`, environment of `pass`): the bug is at the side that it belongs to, and only there."""
    if bug in AT_ORIGIN:
        return [], environment(bug)
    return ["--remote-command", remote_command(bug)], {}
