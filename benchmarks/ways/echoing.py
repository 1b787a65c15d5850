"""The server of a way that moves whole processes, or machines: echo.c, which holds nothing but its connection."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from criu_tcpcp.lab import Host
from world import PORT

from . import Unfit
from .watched import PRECEDENCE


def start(host: Host, directory: Path) -> subprocess.Popen[Any]:
    """It listens on PORT of `host`, as a program of its own in `directory`."""
    program = directory / "echo"
    try:
        done = subprocess.run(["cc", "-O2", "-static", "-o", str(program), str(Path(__file__).with_name("echo.c"))],
                              capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unfit(f"cc: {error.strerror}") from None
    if done.returncode != 0:
        raise Unfit(f"cc failed: {done.stderr.strip()}")
    # A session of its own, nothing on a terminal, and stdout only until it listens: CRIU refuses the rest.
    started = host.spawn([*PRECEDENCE, program, str(PORT)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL, start_new_session=True)
    assert started.stdout is not None
    if started.stdout.readline() != b"listening\n":
        raise Unfit("echo.c does not listen")
    return started
