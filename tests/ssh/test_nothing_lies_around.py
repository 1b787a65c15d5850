"""What goes through a connection is in no file, no log, no command line and no core dump, whatever becomes of the pass.

A marker stands in both queues, in --app-state and in --prologue. The one place where it may lie meanwhile is the
journal (the state at the origin, the prologue at the destination), 0600 in 0700.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from attempt import Attempt, state
from criu_tcpcp.kernel.process import status_lines
from criu_tcpcp.origin import STATE_FILE
from grafting import server
from waiting import until
from world import COMMAND, PORT, World, world

pytestmark = pytest.mark.root

FULL = 20_000  # bytes in each queue, at least


class Marked:
    """A conversation whose queues are full of the marker, and where else it has been seen."""

    def __init__(self, here: World, peer: socket.socket, directory: Path) -> None:
        self.here, self.peer = here, peer
        self.marker = secrets.token_hex(12).encode()
        self.app_state = directory / "app-state"
        self.app_state.write_bytes(b"handed over " + self.marker)

    def fill(self) -> None:
        """The program sends back what it reads; the peer reads nothing."""
        self.peer.sendall((self.marker + b" ") * (3 * FULL // len(self.marker)))
        until(lambda: self.here.queued()[1] > FULL, "the send queue to fill", every_s=0.02)

    def begin(self, step: str, *options: str, shell: str = "exec") -> Attempt:
        """A pass that is stopped at this step, after what came behind the program's last look has the marker, too."""
        at_origin = step.startswith("origin:")
        remote = f"{shell} env 'CRIU_TCPCP_STOP_AT={'' if at_origin else step}' {COMMAND}"
        argv = self.here.pass_argv("--app-state", str(self.app_state), "--max-stall", "10000", *options,
                                   "--remote-command", remote)
        attempt = Attempt(self.here, f"origin:stop,{step}" if at_origin else "origin:stop",
                          argv=["sh", "-c", f'{shell} "$@"', "sh", *argv])
        self.peer.sendall(self.marker)
        until(lambda: self.here.queued()[0], "the receive queue to fill", every_s=0.02)
        (keeper,) = attempt.find("tcpcp-keeper")
        before = switches(keeper)
        os.kill(keeper, signal.SIGCONT)  # not `go_on`: serve may have come to its step by then
        until(lambda: any(state(pid) == "T" and (pid != keeper or switches(pid) != before)
                          for name in ("keeper", "serve") for pid in attempt.find(f"tcpcp-{name}")), step, every_s=0.02)
        return attempt

    def files(self) -> list[Path]:
        """Every file that the tool might have written, and that has the marker in it."""
        roots = [self.here.lab.directory, *(path for base in ("/tmp", "/dev/shm", "/var/log", os.path.expanduser("~"))
                                            for path in Path(base).iterdir() if path.is_file())]
        found = []
        for root in roots:
            for path in root.rglob("*") if root.is_dir() else [root]:
                try:
                    if stat.S_ISREG(path.lstat().st_mode) and self.marker in path.read_bytes():
                        found.append(path)
                except OSError:  # it has gone
                    continue
        return found

    def processes(self) -> list[str]:
        """Those of the tool that show it to whoever may run `ps`."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and (entry / "comm").read_bytes().startswith((b"tcpcp-", b"criu-tcpcp")):
                    found += [f"{entry}/{name}" for name in ("cmdline", "environ", "comm")
                              if self.marker in (entry / name).read_bytes()]
            except OSError:
                continue
        return found

    def lies_nowhere(self, *said: str | None) -> None:
        assert self.files() == []
        assert self.processes() == []
        for words in said:
            assert words is None or self.marker.decode() not in words


def switches(pid: int) -> list[str]:
    """What changes when a process has run."""
    return [line for line in status_lines(pid) if "ctxt_switches" in line]


@contextmanager
def marked(directory: Path) -> Iterator[Marked]:
    """No captures: they would have it."""
    with world("echo", captured=False) as here, here.lab.peer.enter(), socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        peer.settimeout(20)
        peer.connect((str(here.lab.origin.ipv4), PORT))
        here.knows_peer(peer.getsockname()[1])
        made = Marked(here, peer, directory)
        made.fill()
        yield made


def test_after_a_pass_that_went_well(tmp_path: Path) -> None:
    with marked(tmp_path) as one:
        attempt = one.begin("destination:send active", "-v")
        attempt.go_on()
        out, err = attempt.command.communicate(timeout=60)
        assert json.loads(out)["owner"] == "destination", err
        one.lies_nowhere(out, err)
        one.peer.settimeout(20)
        assert one.marker in one.peer.recv(4096)


STOPPED = {"origin:extract": "keeper", "origin:write offered": "command+keeper", "origin:send commit": "command+keeper",
           "destination:graft": "serve", "destination:activate": "serve", "origin:forget": "keeper"}


@pytest.mark.parametrize("step", STOPPED)
def test_in_the_midst_of_a_pass_and_after_it_was_killed(step: str, tmp_path: Path) -> None:
    with marked(tmp_path) as one:
        here = one.here
        attempt = one.begin(step, "-v")
        for path in one.files():
            assert path.name == STATE_FILE, path
            assert path.parent.parent == here.lab.origin.run_dir / "passes"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert one.processes() == []
        for victim in STOPPED[step].split("+"):
            attempt.kill(victim)
        attempt.go_on()
        out, err = attempt.command.communicate(timeout=60)
        until(lambda: not attempt.find("tcpcp-keeper"), "the keeper to end", every_s=0.02)
        settled = here.lab.origin.run([COMMAND, "resolve", "--json"], check=False)
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        one.lies_nowhere(out, err, settled.stdout, settled.stderr)
        known = here.lab.origin.run([COMMAND, "passes", "--json"])
        one.lies_nowhere(known.stdout, known.stderr)


@pytest.mark.parametrize("victim", [None, "serve"])
def test_a_prologue(victim: str | None, tmp_path: Path) -> None:
    """Kept at the destination only until the connection is active."""
    marker = secrets.token_hex(12)
    prologue = tmp_path / "prologue"
    prologue.write_text(f"AUTH {marker}\n")
    programs = {name: server("threads", "0.0.0.0") for name in ("origin", "destination")}
    with world(programs=programs, captured=False) as here, here.lab.peer.enter(), \
            socket.create_connection((str(here.lab.origin.ipv4), PORT), timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        one = Marked(here, peer, tmp_path)
        one.marker = marker.encode()
        options = ("--prologue", str(prologue), "--when", "now", "--into", f"listen:{PORT}")
        if victim is None:
            done = here.owner.run([*here.pass_argv(*options), "--max-stall", "10000"], check=False)
            assert json.loads(done.stdout)["owner"] == "destination", done
            one.lies_nowhere(done.stdout, done.stderr)
            return
        attempt = Attempt(here, "destination:restore", *options)
        (kept,) = one.files()
        assert kept.parent.parent == here.lab.destination.run_dir / "passes"
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
        assert one.processes() == []
        attempt.kill(victim)
        attempt.go_on()
        out, err = attempt.command.communicate(timeout=60)
        here.lab.destination.run([COMMAND, "release"])  # the next command takes it away
        one.lies_nowhere(out, err)


# -- core dumps --------------------------------------------------------------------------------------------------------

def cores(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("core"))


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT], ids=lambda number: number.name)
def test_no_process_that_has_it_leaves_a_core(number: signal.Signals, tmp_path: Path,
                                              capability: Callable[[str, bool], None]) -> None:
    """Each ends as it would by a bug, where a limit lets any other process leave one."""
    directory = tmp_path / "cores"
    directory.mkdir()
    freely = f"cd {directory} && ulimit -c unlimited && exec "
    with marked(tmp_path) as one:
        here = one.here
        control = here.lab.origin.spawn(["sh", "-c", f"{freely} {sys.executable} -c 'import os; os.abort()'"])
        assert control.wait() == -signal.SIGABRT
        capability("core dumps in the working directory", bool(cores(directory)))
        for path in directory.iterdir():
            path.unlink()
        attempt = one.begin("destination:activate", shell=freely)
        keepers, links, serves = (attempt.find(f"tcpcp-{name}") for name in ("keeper", "link", "serve"))
        assert all((keepers, links, serves))
        victims = [*links, attempt.command.pid, *keepers, *serves]
        for pid in victims:
            os.kill(pid, number)
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        until(lambda: not any(attempt.find(f"tcpcp-{name}") for name in ("keeper", "link", "serve")), "all to end",
              every_s=0.02)
        assert attempt.command.wait(60) == -number
        assert cores(directory) == []
        here.lab.origin.run([COMMAND, "resolve"], check=False)
        one.lies_nowhere()
