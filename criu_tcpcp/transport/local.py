"""What the link process does for a command of this machine: start it, listen to its stderr, tell how it ended.

The command has the far end of the socketpair as its stdin and stdout: no byte passes through this process, and a round
trip costs what a socketpair costs. This process keeps neither end, so that the user sees EOF when the command ends and
the command sees EOF when the user closes. The user's closing is seen here by the hang-up of the reports' socket; the
command then has `DRAIN_S` to leave, and is left alone after that, as sshd would leave it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time

from ..core.errors import LinkError
from .link import DRAIN_S, Ending, Reporter
from .target import LocalTarget


def run(target: LocalTarget, data: socket.socket, report: Reporter) -> None:
    """Start the command and stay until it or the user has gone.

    Raises LinkError when it cannot be started, KernelError when there is no such network namespace.
    """
    if target.netns is not None:
        from ..kernel import netns

        with netns.enter(target.netns):
            process = _start(target, data)
    else:
        process = _start(target, data)
    data.close()
    report.connected(None)
    status = _supervise(process, report)
    if status is None:
        return
    if status < 0:
        report.ended(Ending(f"the command was killed by {signal.Signals(-status).name}", None))
    else:
        report.ended(Ending(f"the command ended with status {status}", status))


def _start(target: LocalTarget, data: socket.socket) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            target.argv,
            stdin=data.fileno(),
            stdout=data.fileno(),
            stderr=subprocess.PIPE,
            env={**os.environ, **target.environment},
            start_new_session=True,
            restore_signals=True,
        )
    except FileNotFoundError as error:
        raise LinkError(f"{target}: `{target.argv[0]}` was not found") from error
    except OSError as error:
        raise LinkError(f"{target}: `{target.argv[0]}` cannot be executed: {error.strerror}") from error


def _supervise(process: subprocess.Popen[bytes], report: Reporter) -> int | None:
    """The command's exit status (negative: the signal), or None when the user has gone and the command has not."""
    assert process.stderr is not None
    stderr = process.stderr.fileno()
    pidfd = os.pidfd_open(process.pid)
    poller = select.poll()
    for fd, events in ((stderr, select.POLLIN), (pidfd, select.POLLIN), (report.reports.fileno(), 0)):
        poller.register(fd, events)
    deadline: float | None = None
    while True:
        left_s = None if deadline is None else deadline - time.monotonic()
        ready = dict(poller.poll(None if left_s is None else max(left_s, 0) * 1000))
        if stderr in ready:
            words = os.read(stderr, 65536)
            report.tail.write(words)
            if not words:
                poller.unregister(stderr)
            continue  # its last words before its end
        if pidfd in ready:
            return process.wait()
        if report.reports.fileno() in ready:
            poller.unregister(report.reports.fileno())
            deadline = time.monotonic() + DRAIN_S
        if deadline is not None and time.monotonic() >= deadline:
            return None
