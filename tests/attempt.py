"""A pass that is caught at one of its steps, and a conversation that it must not disturb."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from waiting import until
from world import COMMAND, PORT, World, world


class Attempt:
    """A pass under way, which is stopped at one step."""

    def __init__(self, here: World, step: str, *extra: str, argv: list[str] | None = None, fails_with: str = "",
                 also: str = "", max_stall_ms: int = 10_000) -> None:
        """`argv`: another command than a pass to the other host; all of its processes are on the origin's.
        `fails_with`: the step does not stop, it fails with this errno. `also`: a later point at which to stop, on
        whichever side."""
        self.here = here
        stops = [point for point in ("" if fails_with else step, also) if point]
        variables = {"CRIU_TCPCP_STOP_AT": ",".join(stops),
                     "CRIU_TCPCP_FAIL_AT": f"{step}={fails_with}" if fails_with else ""}
        at_origin = step.startswith("origin:")
        environment = variables if at_origin or argv or also else {}
        options = []
        if not at_origin or also:
            quoted = " ".join(f"'{name}={value}'" for name, value in variables.items())
            options = ["--remote-command", f"env {quoted} {COMMAND}"]
        self.command = here.owner.spawn(argv or here.pass_argv(*options, *extra, "--max-stall", str(max_stall_ms)),
                                        env=environment,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        name = "tcpcp-keeper" if at_origin else "tcpcp-serve"
        if not fails_with:
            until(lambda: self._stopped(name), f"{name} to stop at {step}", every_s=0.02)

    def _stopped(self, name: str) -> bool:
        assert self.command.poll() is None, self.command.communicate()
        found = self.find(name)
        return bool(found) and state(found[0]) == "T"

    def stopped(self) -> list[int]:
        """Processes of ours that stand at a step."""
        pids = [self.command.pid, *self.find("tcpcp-keeper"), *self.find("tcpcp-serve")]
        return [pid for pid in pids if state(pid) == "T"]

    def works(self) -> bool:
        """Something of it may still come to a step."""
        return self.command.poll() is None or bool(self.find("tcpcp-keeper"))

    def find(self, name: str) -> list[int]:
        """Processes of this lab by what they call themselves."""
        wanted = {os.stat(host.netns).st_ino for host in self.here.places}
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and (entry / "comm").read_bytes().strip() == name.encode() \
                        and os.stat(entry / "ns/net").st_ino in wanted:
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def kill(self, *victims: str) -> None:
        for victim in victims:
            self._kill(victim)

    def _kill(self, victim: str) -> None:
        if victim == "command":
            self.command.kill()
            self.command.wait()
        elif victim == "receiver":
            self.here.nodes[self.here.other.name].end()
        else:
            for pid in self.find(f"tcpcp-{victim}"):
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGKILL)

    def go_on(self) -> None:
        for name in ("tcpcp-keeper", "tcpcp-serve"):
            for pid in self.find(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def outcome(self) -> dict[str, object] | None:
        """The report, unless the command was the victim."""
        out, err = self.command.communicate(timeout=60)
        assert "Traceback" not in err, err
        return dict(json.loads(out)) if out else None


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@contextlib.contextmanager
def conversation(**options: Any) -> Iterator[tuple[World, socket.socket]]:
    with world("echo", **options) as here, here.lab.peer.enter(), \
            socket.create_connection((str(here.lab.origin.address(here.version)), PORT), timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        yield here, peer


def exchange(peer: socket.socket, text: bytes) -> None:
    peer.sendall(text)
    got = b""
    while len(got) < len(text):
        data = peer.recv(4096)
        assert data, "end of stream"
        got += data
    assert got == text
