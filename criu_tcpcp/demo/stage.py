"""A stage: the hosts of a lab with sshd and run directories, programs on them, and the real command that passes.

    with stage(print) as here:
        server = here.start(here.lab.origin, [sys.executable, "server.py"])
        server.wait_for("listens")
        here.pass_connection(server, here.descriptors(server)[0], here.lab.destination)

What goes wrong is one line (`Refused`), and whatever happens, the lab goes away: at an error, Ctrl-C and SIGTERM at
once, after SIGKILL when the next lab of the machine starts. The programs are in process groups of their own, so that
Ctrl-C at the terminal is for the one that has the lab, which ends them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..core.errors import Refused
from ..lab import Host, Lab
from ..lab.host import search_path

Say = Callable[[str], None]
#: program -> Debian's package
NEEDED = {"ip": "iproute2", "nft": "nftables", "sshd": "openssh-server", "ssh-keygen": "openssh-client",
          "tcpdump": "tcpdump", "curl": "curl"}
PATIENCE_S = 30.0
_LOOK_S = 0.005


class Program:
    """A program that was started on a host. Its lines on stdout are told as they come, with the host's name."""

    def __init__(self, host: Host, argv: Sequence[str], say: Say) -> None:
        self.host = host
        self._name = os.path.basename(argv[0])
        self._process = host.spawn(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   stdin=subprocess.DEVNULL, process_group=0)
        self._lines: list[str] = []
        self._ended = False
        self._changed = threading.Condition()
        threading.Thread(target=self._read, args=(say,), daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self, say: Say) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # closed with the lab
            for line in self._process.stdout:
                say(f"{self.host.name:>11} | {line.rstrip()}")
                with self._changed:
                    self._lines.append(line.rstrip())
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, text: str) -> str:
        """The first line with this text. Refused where the program ends without it."""
        def found() -> list[str]:
            return [line for line in self._lines if text in line]
        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, PATIENCE_S)
            if not found():
                state = "has ended" if self._ended else "is silent"
                raise Refused(f"the program at the {self.host.name} {state}: "
                              f"{self._lines[-1] if self._lines else self._name}")
            return found()[0]

    def wait(self) -> int:
        """Its exit status, once it has ended by itself."""
        try:
            return self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise Refused(f"the program at the {self.host.name} does not end") from None


class Stage:
    """A lab that is ready for passes."""

    def __init__(self, lab: Lab, say: Say) -> None:
        self.lab = lab
        self.say = say

    def start(self, host: Host, argv: Sequence[str]) -> Program:
        """Start a program on a host."""
        return Program(host, argv, self.say)

    def command(self, host: Host, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run `criu-tcpcp` on a host to its end."""
        process = host.spawn([command(), *argv], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             stdin=subprocess.DEVNULL, process_group=0)
        out, err = process.communicate()
        host.processes.remove(process)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def prepare(self, host: Host) -> None:
        """What an operator does at each host once."""
        host.start_sshd()
        done = self.command(host, "check", "--feature", "run-directory")
        if done.returncode != 0:
            raise Refused(f"the {host.name} cannot be prepared: {_last_line(done.stderr or done.stdout)}")

    def descriptors(self, program: Program) -> list[int]:
        """Of the program's connections that can be passed, as `list` names them, the oldest first."""
        said = self.command(program.host, "list", "--json", "--pid", str(program.pid))
        if said.returncode != 0:
            raise Refused(_last_line(said.stderr))
        return [row["fds"][0] for row in map(json.loads, said.stdout.splitlines()) if row["passable"]]

    def pass_connection(self, program: Program, descriptor: int, to: Host, *options: str) -> dict[str, Any]:
        """`criu-tcpcp pass` at the program's host; returns its report."""
        argv = ["pass", "--pid", str(program.pid), "--fd", str(descriptor), *self.lab.ssh_options(to), *options]
        self.say(f"{program.host.name:>11} # criu-tcpcp {shlex.join(_without_keys(argv))}")
        done = self.command(program.host, *argv, "--json")
        try:
            report = dict(json.loads(done.stdout))
        except ValueError:
            raise Refused(f"the pass failed: {_last_line(done.stderr) or f'status {done.returncode}'}") from None
        if done.returncode != 0:
            raise Refused(f"the pass failed: {report['error']}", hint=report["hint"])
        self.say(f"{'':>11}   passed {report['connection']}; packets of the peer were held for "
                 f"{report['stall_ms'] or 0:.1f} ms")
        return report

    def wait_until(self, condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Until the condition holds. Refused where it does not in time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise Refused(f"waited in vain for {what}")
            time.sleep(_LOOK_S)


@contextlib.contextmanager
def stage(say: Say, more: Sequence[str] = ()) -> Iterator[Stage]:
    """Build it; take it down. `more`: further servers beside origin and destination. Refused says what is missing."""
    require()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_patient_at_the_end())
        try:
            lab = stack.enter_context(Lab(more))
            here = Stage(lab, say)
            for host in lab.hosts.values():
                if host not in (lab.peer, lab.gateway):
                    here.prepare(host)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            raise Refused(f"the hosts cannot be built: {_last_line(str(error))}",
                          hint="network namespaces, root's capabilities and an sshd are needed") from error
        try:
            yield here
        finally:
            # From here on Ctrl-C has to wait: an impatient second one would leave half of the lab standing.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _patient_at_the_end() -> Iterator[None]:
    """Ctrl-C as it was before, once all is taken down."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def require() -> None:
    """Refused names everything that is missing here, in one line."""
    if os.geteuid() != 0:
        raise Refused("root is needed, for network namespaces and for the passes", hint="run it with sudo")
    missing = [name for name in NEEDED if shutil.which(name, path=search_path()) is None]
    if missing:
        packages = " ".join(dict.fromkeys(NEEDED[name] for name in missing))
        raise Refused(f"not installed: {', '.join(missing)}", hint=f"apt install {packages}")
    command()


def command() -> str:
    """The command of this very installation, which the lab's hosts find in their PATH too."""
    found = shutil.which("criu-tcpcp", path=search_path())
    if found is None:
        raise Refused("the command criu-tcpcp is not installed", hint="pip install it, in this Python's environment")
    return found


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].removeprefix("criu-tcpcp: ")


def _without_keys(argv: Sequence[str]) -> list[str]:
    """For people to read: -i and --known-hosts are the lab's own, and the same in every command."""
    kept = list(argv)
    for option in ("-i", "--known-hosts"):
        place = kept.index(option)
        del kept[place:place + 2]
    return kept
