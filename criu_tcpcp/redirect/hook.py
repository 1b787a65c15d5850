"""`hook:CMD`: a program of the operator's moves the connection in the network: in a balancer's table, in a router.

    stage     while staging: can it be done, and is everything at hand?
    [the pass, bridged: the origin host sends the packets on, as by `forward`]
    commit    once the destination serves the peer: from now on the network takes the packets there
    undo      the pass was undone, or its processes were killed before the offer
    release   `release` took away the rules, since the connection has ended: so may the entry

No process starts within the freeze, and if `commit` fails, the bridge stays and the report says so. CMD is a program
with its words, split as a shell would, and no shell. It is started in the network namespace of the command, gets one
JSON object on its stdin (`occasion`) and must end with status 0 within `TIMEOUT_S`. Each event may come more than once,
and `undo` without `stage`, since whoever told the first time may have been killed while telling.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
from dataclasses import dataclass
from typing import Any

from ..core.endpoint import Flow
from ..core.errors import Refused
from ..kernel.syscalls import failing
from . import Plan, Setting
from .bridged import Bridged

TIMEOUT_S = 10.0
_SAID = 200  # characters of its last line on stderr


@dataclass(frozen=True)
class Hook:
    """The program of a plan, and all that it is told."""

    plan: Plan
    setting: Setting

    def occasion(self, event: str, flow: Flow) -> dict[str, Any]:
        """What goes to its stdin."""
        return {"schema": 1, "event": event, "id": self.setting.pass_id, "flow": flow.plain.to_json(),
                "origin": {"name": os.uname().nodename},
                "destination": {"name": self.setting.destination, "address": self.plan.via}}

    def tell(self, event: str, flow: Flow) -> None:
        """Refused where it cannot be started, says no, or does not end in time."""
        text = json.dumps(self.occasion(event, flow)) + "\n"
        name = self.plan.command[0]
        with failing(f"start {name}"), subprocess.Popen(
                self.plan.command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                text=True, errors="replace", start_new_session=True) as program:
            try:
                _, said = program.communicate(text, timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(program.pid, signal.SIGKILL)
                raise Refused(f"the hook {name} has not ended {TIMEOUT_S:g} s after {event!r}") from None
        if program.returncode:
            last = (said.strip().splitlines() or ["it says nothing on stderr"])[-1]
            raise Refused(f"the hook {name} ended with status {program.returncode} on {event!r}: {last[:_SAID]}")


def words_of(command: str) -> tuple[str, ...]:
    """Of `hook:CMD`. Refused where its program is not to be found here."""
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise Refused(f"--redirect hook:{command}: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise Refused(f"--redirect hook: {words[0] if words else 'nothing'} is not a program that can be started here",
                      hint="name an executable file, by its whole path")
    return words


class HookAtOrigin(Bridged):
    """The bridge for as long as it takes, and then the hook."""

    def __init__(self, plan: Plan, setting: Setting) -> None:
        super().__init__(plan, setting)
        self._hook = Hook(plan, setting)

    def announce(self, flow: Flow) -> None:
        self._hook.tell("stage", flow)

    def reroute(self, flow: Flow) -> None:
        self._hook.tell("commit", flow)

    def withdraw(self, flow: Flow) -> None:
        self._hook.tell("undo", flow)

    def forget(self, flow: Flow) -> None:
        self._hook.tell("release", flow)
