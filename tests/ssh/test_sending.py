"""A pass of a connection on which the origin's kernel is still sending by itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from attempt import state
from waiting import until
from world import COMMAND, PORT, World, world

pytestmark = pytest.mark.root

#: Gives its kernel much to send, at 200 kB/s, and then waits.
PACED = f"""if True:
    import socket, sys, time
    listener = socket.create_server((sys.argv[1], {PORT + 1}))
    print("listening", flush=True)
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    sock.setsockopt(socket.SOL_SOCKET, 32, 4_000_000)  # SO_SNDBUFFORCE
    sock.setsockopt(socket.SOL_SOCKET, 47, 200_000)    # SO_MAX_PACING_RATE
    sock.sendall(bytes(2_000_000))
    print("sent", 2_000_000, sock.fileno(), flush=True)
    time.sleep(1000)
"""


class Reader:
    """Reads whatever comes."""

    def __init__(self, sock: socket.socket) -> None:
        self.got = 0
        self._sock = sock
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # closed meanwhile
            while data := self._sock.recv(1 << 16):
                self.got += len(data)


def pass_at(here: World, pid: int, fd: int, step: str) -> dict[str, object]:
    """Pass the connection; the keeper is stopped before this step until the kernel has sent what it may."""
    command = here.lab.origin.spawn(
        [COMMAND, "pass", "--json", "--pid", str(pid), "--fd", str(fd), "--max-stall", "10000", "--into",
         "receiver:" + str(next(here.lab.destination.run_dir.glob("apps/port-*"))),
         *here.lab.ssh_options(here.lab.destination)],
        env={"CRIU_TCPCP_STOP_AT": step}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def keepers() -> list[int]:
        return [int(one) for one in here.lab.origin.run(["pgrep", "-x", "tcpcp-keeper"], check=False).stdout.split()
                if state(int(one)) == "T" and os.stat(f"/proc/{one}/ns/net").st_ino
                == os.stat(here.lab.origin.netns).st_ino]

    until(keepers, f"the keeper to stop at {step}", every_s=0.02)
    until(lambda: "retrans:" in here.lab.origin.run(["ss", "-tin", "sport", "=", f":{PORT + 1}"]).stdout,
          "the origin's kernel to have sent all that it may without an acknowledgement", every_s=0.02)
    for keeper in keepers():
        os.kill(keeper, signal.SIGCONT)
    out, err = command.communicate(timeout=60)
    assert out, err
    return dict(json.loads(out))


def test_what_the_origins_kernel_sends_until_it_is_silent_is_not_unsent() -> None:
    """The destination would take no acknowledgement of it."""
    with world("echo", register=False, captured=False) as here:
        # The origin may have 60 segments on their way, the destination begins with 10.
        here.lab.origin.run(["ip", "route", "change", "default", "via", "10.77.2.1", "initcwnd", "60"])
        program = here.lab.origin.spawn([sys.executable, "-c", PACED, str(here.lab.origin.ipv4)], text=True,
                                        stdout=subprocess.PIPE)
        assert program.stdout is not None
        assert program.stdout.readline() == "listening\n"
        with here.lab.peer.enter(), socket.create_connection((str(here.lab.origin.ipv4), PORT + 1)) as sock:
            peer = Reader(sock)
            _word, written, fd = program.stdout.readline().split()
            report = pass_at(here, program.pid, int(fd), "origin:silence")
            assert report["exit"] in (0, 1), report  # undone, since it moved, is as good
            until(lambda: peer.got == int(written), "all bytes to arrive")
            sock.shutdown(socket.SHUT_RDWR)  # the reader ends
