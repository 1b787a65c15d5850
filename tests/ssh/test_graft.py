"""Into servers that know nothing of passes: one of each kind at both hosts, and the peer cannot tell."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from attempt import exchange
from criu_tcpcp.kernel import process
from criu_tcpcp.kernel.tracee import Tracee
from criu_tcpcp.lab import Host, Lab
from grafting import CONTAINER, MODELS, SEEN, accepted, finish, served, server
from waiting import PATIENCE_S, until
from world import PORT, World, world

pytestmark = pytest.mark.root

CASES = [*((model, 4) for model in MODELS), *((model, 6) for model in MODELS)]
SELDOM = {(model, 6) for model in MODELS} - {("threads", 6), ("epoll-et", 6), ("asyncio", 6), ("prefork", 6)}


@pytest.mark.parametrize(("model", "version"), [
    pytest.param(*case, marks=pytest.mark.long if case in SELDOM else (), id=f"{case[0]}-v{case[1]}")
    for case in CASES])
def test_every_kind_of_server_serves_a_passed_connection(model: str, version: int) -> None:
    """IPv4 from a plain socket into a dual-stack one, and back; IPv6 into a server in a container of its own."""
    destination = server(model, "::", prefix=CONTAINER if version == 6 else ())
    with served(server(model, "0.0.0.0" if version == 4 else "::"), destination, version) as (here, peer):
        report = here.pass_once("--into", f"listen:{PORT}", *SEEN)
        assert report["into"].endswith(f"accepted at [::]:{PORT}")
        told, port = accepted(here)
        assert (told.removeprefix("::ffff:"), port) == peer.getsockname()[:2]
        exchange(peer, b"there")
        if version == 4:
            here.pass_once(*SEEN)
            exchange(peer, b"and back")
        finish(here, peer)


@pytest.mark.parametrize("model", ["threads", "epoll-et"])
def test_what_is_still_to_be_sent_goes_before_what_the_new_server_says(model: str) -> None:
    """The peer does not read: most of what the origin's program wrote waits in the kernel, unsent."""
    message = bytes(range(256)) * 100
    with world(programs={name: server("threads", "0.0.0.0") if name == "origin" else server(model, "0.0.0.0")
                         for name in ("origin", "destination")}) as here, here.lab.peer.enter(), \
            socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.settimeout(20)
        peer.connect((str(here.lab.origin.ipv4), PORT))
        here.knows_peer(peer.getsockname()[1])
        peer.sendall(message)
        until(lambda: here.queued()[1] > len(message) // 2, "the answer to wait", every_s=0.05)
        here.pass_once(*SEEN)
        got = b""
        while len(got) < len(message):
            got += peer.recv(65536)
        assert got == message
        exchange(peer, b"there")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.prove(loss_free=False)
        assert here.release() == []


@pytest.mark.parametrize("model", ["prefork", "reuseport"])
def test_the_one_worker_that_is_named_gets_it(model: str) -> None:
    with served(server("threads", "0.0.0.0"), server(model, "0.0.0.0")) as (here, peer):
        workers = sorted(one["pid"] for one in here.nodes["destination"].events if one["event"] == "worker")
        assert len(workers) == 3
        here.pass_once("--into", f"accept:{workers[1]}", *SEEN)
        assert [pid for pid, _fd in here.serving(here.lab.destination)] == [workers[1]]
        exchange(peer, b"there")
        finish(here, peer)


@pytest.mark.parametrize("where", ["its-own-address", "loopback", "deferred", "another-user", "another-port"])
def test_listeners_of_every_kind(where: str) -> None:
    nobody, other_port = "65534", 9001
    with Lab() as lab:
        address = {"its-own-address": str(lab.destination.ipv4), "loopback": "127.0.0.1"}.get(where, "0.0.0.0")
        options = {"deferred": ["--defer"], "another-user": ["--user", nobody]}.get(where, [])
        destination = server("threads", address, *options)
        port = PORT
        if where == "another-port":
            destination[destination.index(str(PORT))], port = str(other_port), other_port
        here = World(lab, programs={"origin": server("threads", "0.0.0.0"), "destination": destination}, port=port)
        with lab.peer.enter(), socket.create_connection((str(lab.origin.ipv4), PORT), timeout=20) as peer:
            here.knows_peer(peer.getsockname()[1])
            exchange(peer, b"before")
            report = here.pass_once("--into", f"listen:{port}", *SEEN)
            assert report["into"].endswith(f"accepted at {address}:{port}")
            exchange(peer, b"there")
            finish(here, peer)


@pytest.mark.parametrize("model", ["threads", "epoll-et"])
def test_a_descriptor_that_the_program_has_becomes_the_connection(model: str) -> None:
    """One of a client that has gone without a word, and so will never be missed."""
    with served(server("threads", "0.0.0.0"), server(model, "::")) as (here, peer):
        destination = here.lab.destination
        with destination.enter(), socket.create_connection((str(destination.ipv4), PORT), timeout=20) as client:
            there = here.nodes["destination"].wait_for("serving")
            report = here.pass_once("--into", f"pid:{there['pid']}:{there['fd']}", *SEEN)
            assert report["into"].endswith(f"descriptor {there['fd']}")
            exchange(peer, b"there")
            assert here.serving(destination) == [(there["pid"], there["fd"])]
            set_linger(client)
        finish(here, peer)


@pytest.mark.parametrize("version", [4, 6])
def test_a_descriptor_is_made_in_a_program_that_is_then_told_of_it(version: int) -> None:
    """Until then what the peer says waits in the kernel, as it would for any program that is slow to read."""
    with served(server("threads", "0.0.0.0" if version == 4 else "::"), server("told", "::"), version) as (here, peer):
        destination, pid = here.lab.destination, here.nodes["destination"].wait_for("listening")["pid"]
        numbers = set(process.descriptors(pid))
        lowest = min(set(range(99)) - numbers)
        report = here.pass_once("--into", f"pid:{pid}", *SEEN)
        assert report["into"].endswith(f"descriptor {lowest}")
        assert set(process.descriptors(pid)) == {*numbers, lowest}
        peer.sendall(b"nobody is told yet")
        with destination.enter(), socket.create_connection((str(destination.ipv4), PORT), timeout=20) as client:
            client.sendall(b"serve %d" % lowest)
            assert client.recv(10) == b"yes"
        assert peer.recv(100) == b"nobody is told yet"
        exchange(peer, b"there")
        finish(here, peer)


@pytest.mark.parametrize("model", ["spare", "spare-et"])
def test_a_descriptor_of_something_else_is_replaced_where_it_is_watched(model: str) -> None:
    """The program's event loop goes on with it: the same number, the same events and data in each epoll instance."""
    with served(server("threads", "0.0.0.0"), server(model, "0.0.0.0")) as (here, peer):
        spare = here.nodes["destination"].wait_for("spare")
        numbers, watched = set(process.descriptors(spare["pid"])), watches(spare)
        report = here.pass_once("--into", f"pid:{spare['pid']}:{spare['fd']}", *SEEN)
        assert f"descriptor {spare['fd']}, socket:" in report["into"]
        assert here.serving(here.lab.destination) == [(spare["pid"], spare["fd"])]
        assert (set(process.descriptors(spare["pid"])), watches(spare)) == (numbers, watched)
        exchange(peer, b"there")
        exchange(peer, b"and again")
        finish(here, peer)


def watches(spare: dict[str, Any]) -> list[list[str]]:
    """Descriptor, events and data of what each epoll instance watches."""
    return [line.split()[1:6] for one in spare["epolls"] for line in process.descriptor_lines(spare["pid"], one)
            if line.startswith("tfd")]


def set_linger(sock: socket.socket) -> None:
    """Its close is a reset: nobody is there to end it with."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


class Refused(NamedTuple):
    """A destination's program, the way in, and what is said of it."""

    model: str
    options: list[str]
    into: str
    words: str


REFUSALS = {
    "nobody": Refused("select", [], "listen:7", "nobody listens on port 7 at the destination"),
    "no-process": Refused("select", [], "accept:999999999", "there is no process 999999999"),
    "no-listener": Refused("select", [], "accept:{other}", "listens on no TCP port"),
    "speaks-first": Refused("greet", [], "accept:{pid}", "speaks first"),
    "closes": Refused("shut", [], "accept:{pid}", "accepts a connection from this peer and closes it at once"),
    "full": Refused("idle", ["--backlog", "0"], "accept:{pid}", "the backlog of the listener at 0.0.0.0:9000 is full"),
    "hangs": Refused("idle", [], "accept:{pid}", "nobody accepted a connection at 0.0.0.0:9000 within 2 s"),
    "exits": Refused("stepping-out", [], "accept:{pid}", "closes it at once"),
    "IPv6-only": Refused("select", ["--only-ipv6"], "accept:{pid}", "takes no IPv4 connection"),
    "unix": Refused("select", [], "accept:{pid}", "listens on only unix sockets"),
    "io_uring": Refused("select", [], "accept:{pid}", "accepts by io_uring"),
    "32-bit": Refused("select", [], "accept:{other}", "is a 32-bit program"),
    "traced": Refused("select", [], "accept:{pid}", "already"),
    "no-descriptor": Refused("select", [], "pid:{pid}:999", "has no descriptor 999"),
    "listener": Refused("select", [], "pid:{pid}:3", "listens"),
    "seccomp": Refused("select", [], "pid:{other}", "has a seccomp filter"),
    "computes": Refused("select", [], "pid:{other}", "was in a system call within"),
    "marked": Refused("select", [], "accept:{pid}", "takes over the mark"),
    "elsewhere": Refused("select", [], "accept:{pid}", "has no route to the peer"),
}


URING_SERVER = Path(__file__).parents[1] / "uring_server.c"
FILTERED = """if True:
    import ctypes, os, struct, time
    libc = ctypes.CDLL(None)
    code = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0x7fff0000))  # return SECCOMP_RET_ALLOW
    filter = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", 1, ctypes.addressof(code)))
    assert libc.prctl(38, 1, 0, 0, 0) == libc.prctl(22, 2, filter, 0, 0) == 0  # no new privileges; PR_SET_SECCOMP
    print("ready", flush=True)
    time.sleep(1000)"""
COMPUTES = "print('ready', flush=True)\nwhile True: pass"
PAUSES = "void _start(void) { for (;;) __asm__ volatile (\"int $0x80\" : : \"a\" (29)); }"  # pause of i386


def compiled(directory: Path, source: Path | str, *options: str) -> str:
    program = directory / "program"
    file = source if isinstance(source, Path) else directory / "program.c"
    if isinstance(source, str):
        file.write_text(source)
    subprocess.run(["gcc", *options, "-o", program, file], check=True)
    return str(program)


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_done_is_refused_and_nothing_is_touched(case: str, tmp_path: Path) -> None:
    wanted = REFUSALS[case]
    address = {"IPv6-only": "::", "unix": str(tmp_path / "socket")}.get(case, "0.0.0.0")
    prefix = ["unshare", "--net"] if case == "elsewhere" else []
    with Lab() as lab, contextlib.ExitStack() as stack:
        destination = server(wanted.model, address, *wanted.options, prefix=prefix)
        if case == "io_uring":
            destination = [compiled(tmp_path, URING_SERVER), str(PORT)]
        programs = {"origin": server("threads", "0.0.0.0"), "destination": destination}
        here = World(lab, programs=programs, waiting=False)
        here.node.wait_for("listening")
        pid = here.nodes["destination"].wait_for("listening")["pid"]
        if case == "full":
            with lab.destination.enter():
                stack.enter_context(socket.create_connection((str(lab.destination.ipv4), PORT), timeout=5))
        if case == "marked":
            lab.destination.run(["sysctl", "-qw", "net.ipv4.tcp_fwmark_accept=1"])
        if case == "traced":
            stack.enter_context(traced(pid))
        with lab.peer.enter(), socket.create_connection((str(lab.origin.ipv4), PORT), timeout=20) as peer:
            here.knows_peer(peer.getsockname()[1])
            exchange(peer, b"before")
            argv = ["sleep", "1000"]
            if case == "32-bit":
                argv = [compiled(tmp_path, PAUSES, "-m32", "-nostdlib", "-static")]
            if case == "seccomp":
                argv = [sys.executable, "-c", FILTERED]
            if case == "computes":
                argv = [sys.executable, "-c", COMPUTES]
            into = wanted.into.format(pid=pid, other=spawned(lab.destination, argv))
            done = lab.origin.run(here.pass_argv("--into", into), check=False)
            report = json.loads(done.stdout)
            assert (report["owner"], report["exit"], done.returncode) == ("origin", 3, 3), report
            assert wanted.words in report["error"], report
            exchange(peer, b"after")
            peer.shutdown(socket.SHUT_WR)
            assert peer.recv(1) == b""
        here.prove(passes=0)
        assert here.release() == []


def spawned(host: Host, argv: list[str]) -> int:
    """Once it is ready, where it says so."""
    program = host.spawn(argv, stdout=subprocess.PIPE)
    if argv[0] == sys.executable:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
    return int(program.pid)


@contextmanager
def traced(pid: int) -> Iterator[None]:
    """By a thread of this process."""
    began, over = threading.Event(), threading.Event()

    def trace() -> None:
        tracee = Tracee(pid)
        tracee.stop(2)
        began.set()
        over.wait()
        tracee.resume()
    thread = threading.Thread(target=trace)
    thread.start()
    assert began.wait(PATIENCE_S)
    try:
        yield
    finally:
        over.set()
        thread.join()
