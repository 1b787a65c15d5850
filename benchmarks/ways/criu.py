"""CRIU's way: a small process with one connection is dumped, its images are copied over SSH, and it is restored.

The copy goes to another host and the restored process back to its own: the connection's address stays there, and moving
that as well would be the network's work, not CRIU's. Its packet filter is nftables, which needs no other program.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from criu_tcpcp.lab import Lab
from waiting import until

from . import Unfit, echoing
from .watched import PRECEDENCE, Watched, figures

_TCP = ["--tcp-established", "--network-lock", "nftables"]
_PR_SET_CHILD_SUBREAPER = 36      # linux/prctl.h
# What CRIU finds out about the kernel, kept for its next run (criu/kerndat.c, KERNDAT_CACHE_FILE); the second is left
# where /run is on a disk.
_KEPT = (Path("/run/criu.kdat"), Path("/run/criu.kdat.tmp"))


def version(criu: Path) -> str:
    """As `criu --version` tells; raises Unfit if `criu check` says that it does not work on this kernel."""
    with _nothing_kept():
        try:
            told = subprocess.run([criu, "--version"], capture_output=True, text=True, check=False).stdout
            check = subprocess.run([criu, "check"], capture_output=True, text=True, check=False)
        except OSError as error:
            raise Unfit(f"{criu}: {error.strerror}") from None
    found = re.search(r"Version: (\S+)", told)
    name = found[1] if found else "?"
    if check.returncode != 0:
        raise Unfit(f"{name} on Linux {os.uname().release}, `{criu} check`: {reason(check.stderr)}")
    return name


def reason(said: str) -> str:
    """The errors in what criu said, without the places in its source; each once."""
    texts = re.findall(r"^(?:\([\d.]+\) )?Error (?:\([^)]*\): ?)?(.*)$", said, re.MULTILINE)
    return "; ".join(dict.fromkeys(texts)) or " ".join(said.split()) or "no reason given"


def moves(criu: Path, rounds: int) -> dict[str, Any]:
    """The figures of `rounds` dumps and restores; raises Unfit if one fails."""
    number = version(criu)
    with _nothing_kept(), _adopting(), Lab() as lab:
        process = _Process(lab, criu)
        watched = Watched.asking(lab, "--echoed")
        try:
            for one in range(rounds):
                watched.move(process.move, one)
        except Unfit as why:
            raise Unfit(f"{number} on Linux {os.uname().release}, {why}") from None
        result = figures(f"criu {number}, dump, copy and restore", [watched.seen()])
        process.reap()
        return result


class _Process:
    """The small process (echo.c), and how it is moved."""

    def __init__(self, lab: Lab, criu: Path) -> None:
        self._lab, self._criu = lab, criu
        started = echoing.start(lab.origin, lab.directory)
        self._pid = started.pid
        self._started: subprocess.Popen[Any] | None = started
        self._ssh = self._connect()

    def _connect(self) -> list[str]:
        """An SSH connection to the destination that stands before the first move, as our pass has one in its freeze."""
        lab = self._lab
        lab.destination.start_sshd()
        ssh = ["ssh", "-F", str(lab.ssh.config), "-S", str(lab.directory / "master")]
        lab.origin.spawn([*ssh, "-M", "-N", "destination"], stdin=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL)      # "closed by remote host", when the lab goes
        until(lambda: lab.origin.run([*ssh, "-O", "check", "destination"], check=False).returncode == 0, "ssh's master")
        return ssh

    def move(self, number: int) -> dict[str, float]:
        """Dump, copy, restore: what each took, in ms, as its caller sees it."""
        here, there = (host.run_dir / f"images-{number}" for host in (self._lab.origin, self._lab.destination))
        for directory in (here, there):
            directory.mkdir()
        begun = time.monotonic()
        self._criu_on_origin("dump", "--tree", str(self._pid), "--images-dir", str(here), *_TCP)
        self.reap()      # on another host its number would be free at once
        dumped = time.monotonic()
        copy = f'tar -C {here} -cf - . | "$@" destination "tar -C {there} -xf -"'
        done = self._lab.origin.run([*PRECEDENCE, "sh", "-c", copy, "sh", *self._ssh], check=False)
        if done.returncode != 0:
            raise Unfit(f"the copy failed: {done.stderr.strip()}")
        copied = time.monotonic()
        self._criu_on_origin("restore", "--restore-detached", "--images-dir", str(there), *_TCP)
        restored = time.monotonic()
        return {"dump": (dumped - begun) * 1e3, "copy": (copied - dumped) * 1e3, "restore": (restored - copied) * 1e3}

    def _criu_on_origin(self, action: str, *options: str) -> None:
        done = self._lab.origin.run([*PRECEDENCE, self._criu, action, *options], check=False)
        if done.returncode != 0:
            raise Unfit(f"`{self._criu} {action}`: {reason(done.stderr)}")

    def reap(self) -> None:
        """Wait for the end of the process, the first one or the one that was restored last."""
        if self._started is not None:
            self._started.wait()
            self._started = None
        else:
            os.waitpid(self._pid, 0)


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Restored processes become this one's children when the criu that made them has ended, and can be waited for
    (prctl(2), PR_SET_CHILD_SUBREAPER): the next restore needs their number."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    """What criu leaves outside the lab goes with it."""
    new = [path for path in _KEPT if not path.exists()]
    try:
        yield
    finally:
        for path in new:
            path.unlink(missing_ok=True)
