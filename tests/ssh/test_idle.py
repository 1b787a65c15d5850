"""Into another program a connection goes only when no request is half read or half answered (`--when idle`), and not
with TLS records in its queues."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from attempt import exchange
from criu_tcpcp.kernel import syscalls, tcpinfo
from grafting import SEEN, finish, server
from waiting import until
from world import PORT, World, world

pytestmark = pytest.mark.root


@contextmanager
def served(origin: list[str], **options: Any) -> Iterator[tuple[World, socket.socket]]:
    with world(programs={"origin": origin, "destination": server("threads", "0.0.0.0")}, **options) as here, \
            here.lab.peer.enter(), \
            socket.create_connection((str(here.lab.origin.ipv4), PORT), timeout=20) as peer:
        here.knows_peer(peer.getsockname()[1])
        until(lambda: info(here).last_data_sent_ms > 20, "the kernel's clock to tick")
        yield here, peer


def info(here: World) -> tcpinfo.TcpInfo:
    """Of the connection, at its owner."""
    pid, descriptor = here.serving(here.owner)[0]
    pidfd = syscalls.pidfd_open(pid)
    try:
        with syscalls.borrow_socket(pidfd, descriptor) as sock:
            return tcpinfo.read(sock)
    finally:
        os.close(pidfd)


def refused(here: World, words: str, *options: str) -> None:
    done = here.owner.run(here.pass_argv(*options), check=False)
    report = json.loads(done.stdout)
    assert (report["owner"], report["exit"], done.returncode) == ("origin", 3, 3), report
    assert words in report["error"], report


def go(here: World) -> None:
    with here.lab.origin.enter(), socket.create_connection((str(here.lab.origin.ipv4), PORT), timeout=20) as other:
        other.sendall(b"go\n")
        other.shutdown(socket.SHUT_WR)
        assert other.recv(1) == b""


def answer(peer: socket.socket, wanted: bytes) -> None:
    got = b""
    while len(got) < len(wanted):
        got += peer.recv(100)
    assert got == wanted


def said(here: World) -> str:
    return "".join(one["text"] for one in here.nodes["origin"].events if one["event"] == "read")


def test_a_request_that_is_half_read_or_not_answered_yet_stays() -> None:
    with served(server("late", "0.0.0.0")) as (here, peer):
        peer.sendall(b"hel")
        until(lambda: said(here) == "hel", "the first half to be read")
        refused(here, "no quiet instant of process")
        peer.sendall(b"lo\n")
        until(lambda: said(here) == "hello\n", "the whole to be read")
        refused(here, "what the peer said last is not answered", "--when", "idle:1")
        go(here)
        answer(peer, b"hello\n")
        here.pass_once(*SEEN, "--when", "idle:20000", "--max-stall", "10000")
        exchange(peer, b"there")
        finish(here, peer)


def test_it_waits_for_the_answer() -> None:
    with served(server("late", "0.0.0.0")) as (here, peer):
        peer.sendall(b"hello\n")
        until(lambda: said(here) == "hello\n", "the request to be read")
        passing = here.owner.spawn(here.pass_argv("--when", "idle:60000", "--max-stall", "10000", *SEEN),
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        journal = here.lab.origin.run_dir / "passes"
        until(lambda: any('"intent"' in one.read_text() for one in journal.glob("*.origin/log")),
              "the pass to look for its instant", every_s=0.01)
        go(here)
        answer(peer, b"hello\n")
        told, problem = passing.communicate(timeout=60)
        assert passing.returncode == 0, (told, problem)
        here.owner = here.lab.destination
        exchange(peer, b"there")
        finish_after(here, peer)


def finish_after(here: World, peer: socket.socket) -> None:
    peer.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    here.prove(passes=1)
    assert here.release() == []


#: Shakes hands, tells what it reads; with a number, then writes so many bytes.
TLS_SERVER = """if True:
    import json, socket, ssl, sys, threading
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[1])
    context.num_tickets = 0
    listener = socket.create_server(("0.0.0.0", int(sys.argv[2])))
    print(json.dumps({"event": "listening"}), flush=True)
    sock = context.wrap_socket(listener.accept()[0], server_side=True)
    print(json.dumps({"event": "read", "text": sock.recv(100).decode()}), flush=True)
    sock.sendall(b"x" * int(sys.argv[3]))
    print(json.dumps({"event": "written"}), flush=True)
    threading.Event().wait()
"""


class Client:
    """A TLS client whose records are seen: what is sent, and what comes."""

    def __init__(self, peer: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.peer, self._in, self._out = peer, ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out)
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                peer.sendall(self._out.read())
                self._in.write(peer.recv(1 << 16))
        peer.sendall(self._out.read())

    def send(self, text: bytes) -> bytes:
        """The records of it."""
        self._tls.write(text)
        records = self._out.read()
        self.peer.sendall(records)
        return records


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-subj", "/CN=test", "-keyout", path, "-out", f"{path}.crt"], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def tls_server(certificate: Path, writes: int) -> list[str]:
    return [sys.executable, "-c", TLS_SERVER, str(certificate), str(PORT), str(writes)]


@pytest.mark.parametrize("into", ["auto", "pid"])
def test_tls_records_in_the_receive_queue(certificate: Path, into: str) -> None:
    with served(tls_server(certificate, 0)) as (here, peer):
        client = Client(peer)
        client.send(b"hello")
        here.nodes["origin"].wait_for("written")
        records = client.send(b"a secret")
        until(lambda: here.queued()[0] == len(records), "the record to wait")
        there = here.nodes["destination"].wait_for("listening")["pid"]
        with here.lab.destination.enter(), \
                socket.create_connection((str(here.lab.destination.ipv4), PORT), timeout=20) as other:
            serving = here.nodes["destination"].wait_for("serving")
            refused(here, "TLS records", "--into", "auto" if into == "auto" else f"pid:{there}:{serving['fd']}")
            other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if into == "auto":
            here.pass_once("--when", "now", "--max-stall", "10000", "--tls-anyway", *SEEN)
            answer(peer, records)  # told to, it goes: to a server that sends it back as it is
            finish_after(here, peer)
        else:
            assert here.release() == []


def read(peer: socket.socket) -> None:
    """What there is."""
    with contextlib.suppress(BlockingIOError):
        assert peer.recv(1 << 20)


def test_tls_records_in_the_send_queue(certificate: Path) -> None:
    """They are seen only when the connection is held: it is given back."""
    with served(tls_server(certificate, 1 << 24)) as (here, peer):
        client = Client(peer)
        client.send(b"hello")
        until(lambda: here.queued()[1] > 1 << 16, "the send queue to fill")
        done = here.owner.run(here.pass_argv("--when", "now"), check=False)
        report = json.loads(done.stdout)
        assert (report["owner"], report["exit"], done.returncode) == ("origin", 1, 1), report
        assert "TLS records" in report["error"]
        assert here.nodes["origin"].count("written") == 0
        peer.setblocking(False)
        until(lambda: here.nodes["origin"].count("written") or read(peer), "the rest to be written")
        assert here.release() == []
