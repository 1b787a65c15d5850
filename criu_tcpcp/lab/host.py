"""One host of a lab: a network namespace, a run directory, and the processes that were started there."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from criu_tcpcp.kernel import netns

if TYPE_CHECKING:
    from .network import Place
    from .sshd import Ssh


class Host:
    """A host. All of them share the machine's file system and process table; network and run directory are its own."""

    def __init__(self, name: str, namespace: Path, run_dir: Path, place: Place, ssh: Ssh) -> None:
        self.name = name
        self.netns = namespace
        self.run_dir = run_dir
        self.interface = place.interface
        self.ipv4: ipaddress.IPv4Address = place.ipv4.ip
        self.ipv6: ipaddress.IPv6Address = place.ipv6.ip
        self.processes: list[subprocess.Popen[Any]] = []      # what `spawn` started, ended or not
        self._ssh = ssh

    def __repr__(self) -> str:
        return f"<Host {self.name}: {self.ipv4}, {self.ipv6}>"

    def address(self, version: int) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """Its address of IP version 4 or 6. The gateway's is the one that the servers see."""
        return self.ipv6 if version == 6 else self.ipv4

    def enter(self) -> contextlib.AbstractContextManager[None]:
        """The calling thread is on this host inside the `with`: sockets made there are this host's for life."""
        return netns.enter(self.netns)

    def environment(self) -> dict[str, str]:
        """What tells a program which host it is on; its PATH finds the programs of this Python's environment first."""
        return {"CRIU_TCPCP_RUN_DIR": str(self.run_dir), "PATH": search_path()}

    def spawn(self, argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str] | None = None,
              **popen_kwargs: Any) -> subprocess.Popen[Any]:
        """Start a program on this host; it is killed with the lab. `env` is added to the host's environment."""
        variables = {**os.environ, **self.environment(), **(env or {})}
        # A child is born in the namespace of the thread that forks, so neither `ip netns exec` nor a preexec_fn (which
        # would cost the cheap vfork) is needed.
        with self.enter():
            process: subprocess.Popen[Any] = subprocess.Popen(argv, env=variables, **popen_kwargs)
        self.processes.append(process)
        return process

    def run(self, argv: Sequence[str | os.PathLike[str]], *, check: bool = True, timeout: float = 30,
            input: str | None = None, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a program on this host to its end, and capture what it says."""
        process = self.spawn(argv, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             stdin=subprocess.DEVNULL if input is None else subprocess.PIPE)
        try:
            stdout, stderr = process.communicate(input, timeout)
        finally:
            self._end(process)
            self.processes.remove(process)
        if check and process.returncode != 0:
            error = subprocess.CalledProcessError(process.returncode, process.args, stdout, stderr)
            error.add_note(f"on {self.name}, stderr: {stderr.strip()}")
            raise error
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def limit_run_directory(self, size: str) -> None:
        """From now on it is a file system of its own, as /run is, of this size ("2m"): a disk that can be full. What
        was in it is hidden."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", self.run_dir], check=True)

    def start_sshd(self) -> None:
        """Have an sshd listen on port 22 of this host. Does nothing if it does already."""
        self._ssh.start(self)

    def collect_processes(self) -> None:
        """Kill what `spawn` started, wait for its end, and close our ends of its pipes."""
        for process in self.processes:
            process.kill()
        while self.processes:
            self._end(self.processes.pop())

    @staticmethod
    def _end(process: subprocess.Popen[Any]) -> None:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):      # what was buffered for a program that is gone
                    stream.close()


def search_path() -> str:
    """PATH with the programs of this Python's environment first, and the system's, sbin too, last."""
    system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    parts = [os.path.dirname(sys.executable), *os.environ.get("PATH", "").split(":"), *system.split(":")]
    return ":".join(dict.fromkeys(part for part in parts if part))
