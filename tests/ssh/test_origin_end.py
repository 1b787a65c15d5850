"""What the program at the origin sees of its connection once that has gone: docs/origin-end.md says it for each
runtime, and this is where it is held against the real ones."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import programs
from criu_tcpcp.lab import Lab
from waiting import until
from world import COMMAND, Program, users

pytestmark = pytest.mark.root

HERE = Path(__file__).parents[1]
DOCUMENT = HERE.parent / "docs" / "origin-end.md"
#: The system call in which each way waits (asm/unistd_64.h; asm-generic/unistd.h).
WAITS_IN = {"x86_64": {"recv": (45,), "send": (44,), "poll": (7,), "epoll": (232,), "idle": (0,), "asyncio": (232,)},
            "aarch64": {"recv": (207,), "send": (206,), "poll": (73,), "epoll": (22,), "idle": (63,),
                        "asyncio": (22,)}}.get(platform.machine(), {})
PYTHON = {"recv": "CPython, a thread in recv", "send": "CPython, a thread in send", "poll": "CPython, a thread in poll",
          "epoll": "CPython, a thread in epoll", "idle": "CPython, a thread elsewhere", "asyncio": "asyncio, streams"}


def documented() -> dict[str, tuple[str, str]]:
    """Runtime -> (with reset, with eof), of the document's table."""
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {name: (reset, eof) for name, reset, eof in rows if name != "program"}


class Ended:
    """Connections of one host's programs, each ended as a pass ends it: `dump` does, and needs no second host."""

    def __init__(self, lab: Lab, directory: Path, sees: str) -> None:
        self.lab, self.directory, self.sees = lab, directory, sees
        self.port = 9000

    def start(self, argv: list[str], *, listens: str = "") -> Program:
        self.port += 1
        program = Program(self.lab.origin, [word.replace("{port}", str(self.port)) for word in argv],
                          **({"stdin": -1} if not listens else {}))
        if not listens:
            program.wait_for("listening")
        else:
            until(lambda: self.lab.origin.run(["ss", "-tlnH", "sport", "=", str(self.port)]).stdout,
                  f"{listens} to listen", every_s=0.02)
        return program

    def connect(self) -> socket.socket:
        with self.lab.peer.enter():
            return socket.create_connection((str(self.lab.origin.ipv4), self.port), timeout=20)

    def end(self, peer: socket.socket, *options: str) -> tuple[int, int]:
        """(process, descriptor) that had it."""
        def found() -> list[tuple[int, int]]:
            return users(self.lab.origin.run(["ss", "-tnpH", "dport", "=", str(peer.getsockname()[1])]).stdout)
        until(found, "the connection to be accepted", every_s=0.02)
        pid, descriptor = found()[0]
        place = self.directory / f"{self.port}"
        self.lab.origin.run([COMMAND, "dump", "--pid", str(pid), "--fd", str(descriptor), "-D", str(place),
                             "--origin-sees", self.sees, *options])
        return pid, descriptor

    def is_closed_by(self, program: Program, who: str) -> None:
        """A web server closes a connection that waits for its next request, and goes on with others."""
        with self.connect() as peer:
            ask(peer, b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            pid, descriptor = self.end(peer)
            until(lambda: closed(pid, descriptor), f"{who} to close it")
        with self.connect() as other:
            ask(other, b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        assert program.process.poll() is None

    # -- the runtimes --------------------------------------------------------------------------------------------------

    def python(self, way: str) -> str:
        program = self.start([sys.executable, str(HERE / "endings.py"), way, "{port}"])
        with self.connect() as peer:
            serving = program.wait_for("serving")
            path = Path(f"/proc/{serving['pid']}/task/{serving['tid']}/syscall")
            until(lambda: int(path.read_text().split()[0]) in WAITS_IN[way]
                  if path.read_text()[0].isdigit() else False, f"the thread to wait in {way}")
            self.end(peer)
            if way == "idle":
                assert program.process.stdin is not None
                program.process.stdin.write("\n")
                program.process.stdin.flush()
            return ", then ".join(program.wait_for("ended")["words"])

    def node(self) -> str:
        program = self.start(["node", str(HERE / "endings.js"), "{port}"])
        with self.connect() as peer:
            self.end(peer)
            return ", ".join(program.wait_for("ended")["words"])

    def redis(self) -> str:
        """The client is freed, and its log says why."""
        program = self.start(programs.redis(self.directory, "redis", self.port + 1), listens="redis")
        with self.connect() as peer:
            ask(peer, b"PING\r\n")
            pid, descriptor = self.end(peer)
            until(lambda: closed(pid, descriptor), "redis to close it")
            log = (self.directory / "redis" / "log").read_text()
            word = re.search(r" - (Client closed connection|Reading from client: [^\n]*)", log)
            assert word is not None, log
        with self.connect() as other:
            ask(other, b"PING\r\n")
        assert program.process.poll() is None
        return f"closes it: {word[1].split(' id=')[0]}"

    def nginx(self) -> str:
        program = self.start(programs.nginx(self.directory, "nginx", self.port + 1), listens="nginx")
        self.is_closed_by(program, "nginx")
        errors = (self.directory / "nginx" / "errors").read_text()
        word = re.search(r"\[(?:info|alert)\][^\n]*?: \*1 (?:client \S+ )?(closed keepalive connection|"
                         r"recv\(\) failed[^\n]*? while keepalive)", errors)
        assert word is not None, errors
        return f"closes it: {word[1]}"

    def haproxy(self) -> str:
        """It says nothing of a connection that waits for its next request."""
        program = self.start(programs.haproxy(self.directory, "haproxy", self.port + 1), listens="haproxy")
        self.is_closed_by(program, "haproxy")
        log = self.directory / "haproxy" / "log"
        until(lambda: len(log.read_text().splitlines()) >= 2, "both requests in its log, written behind the answers")
        assert len(log.read_text().splitlines()) == 2
        return "closes it"

    def go(self) -> str:
        """net/http says nothing of it either."""
        program = self.start(programs.node_exporter(self.directory, "go", self.port + 1), listens="the exporter")
        self.is_closed_by(program, "the server")
        return "closes it"


def ask(peer: socket.socket, request: bytes) -> None:
    peer.sendall(request)
    assert peer.recv(1 << 16)


def closed(pid: int, descriptor: int) -> bool:
    try:
        return not os.readlink(f"/proc/{pid}/fd/{descriptor}").startswith("socket:")
    except FileNotFoundError:
        return True


RUNTIMES: dict[str, Callable[[Ended], str]] = {
    **{name: lambda one, way=way: one.python(way) for way, name in PYTHON.items()},  # type: ignore[misc]
    "Node, net": Ended.node, "Redis": Ended.redis, "nginx, keep-alive": Ended.nginx,
    "HAProxy, keep-alive": Ended.haproxy, "Go, net/http": Ended.go}


def test_the_document_has_every_runtime() -> None:
    assert set(documented()) == set(RUNTIMES)


@pytest.mark.parametrize("sees", ["reset", "eof"])
def test_what_a_program_sees_of_a_connection_that_has_gone(sees: str, lab: Lab, tmp_path: Path) -> None:
    ended = Ended(lab, tmp_path, sees)
    here = dict(RUNTIMES)
    if shutil.which("node") is None:
        del here["Node, net"]  # ./dev setup has it where Debian offers it
    seen = {name: runtime(ended) for name, runtime in here.items()}
    column = ("reset", "eof").index(sees)
    assert seen == {name: cells[column] for name, cells in documented().items() if name in here}, json.dumps(seen)
