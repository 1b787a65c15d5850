"""The application's half of the conversation with the tool: Receiver and register, on plain sockets."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from criu_tcpcp import apps, journal
from criu_tcpcp.application import Passed, Receiver, register
from criu_tcpcp.apps import Conversation, Gone
from criu_tcpcp.core.endpoint import Flow
from criu_tcpcp.core.errors import Refused, UsageError
from criu_tcpcp.kernel import tcpinfo
from waiting import until

NOBODY = 65534
#: The kernel counts cookies up from one a processor (net/core/sock_diag.c, sock_gen_cookie): none gets here.
NOT_REGISTERED = 1 << 62
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRIU_TCPCP_RUN_DIR", str(tmp_path / "run"))
    journal.prepare_run_directory()
    return tmp_path / "run"


@pytest.fixture
def pair() -> Iterator[Pair]:
    """(one end of a TCP connection, its peer)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname(), 10)
        ours, _ = listener.accept()
    with ours, peer:
        yield ours, peer


@contextlib.contextmanager
def tool(path: Path) -> Iterator[Conversation]:
    conversation = apps.connect(path, 5)
    try:
        yield conversation
    finally:
        conversation.close()


def offer(conversation: Conversation, pass_id: str, sock: socket.socket, state: bytes = b"", **changes: Any) -> None:
    descriptor = apps.wrap_state(state)
    try:
        packet = {"op": "offer", "id": pass_id, "flow": Flow.of_socket(sock).to_json()} | changes
        conversation.send(packet, [sock.fileno(), descriptor])
    finally:
        os.close(descriptor)


def settled(conversation: Conversation) -> None:
    """Everything that was said before has been heard."""
    assert conversation.ask({"op": "ping"}) == ({"op": "pong"}, [])


def test_offered_and_activated_it_is_handed_out(pair: Pair) -> None:
    ours, peer = pair
    with Receiver(port=9000) as receiver, tool(receiver.path) as serve:
        assert not stat.S_IMODE(receiver.path.stat().st_mode) & 0o077
        offer(serve, "a" * 16, ours, b"state of the application")
        settled(serve)
        assert not select.select([receiver], [], [], 0)[0]
        with pytest.raises(TimeoutError):
            receiver.accept(0)
        ours.close()
        serve.send({"op": "active", "id": "a" * 16})
        assert select.select([receiver], [], [], 10)[0] == [receiver]
        passed = receiver.accept(10)
        assert isinstance(passed, Passed)
        assert not select.select([receiver], [], [], 0)[0]
        assert passed.app_state == b"state of the application"
        assert passed.id == "a" * 16
        assert (str(passed.peer.address), passed.peer.port) == peer.getsockname()
        assert (str(passed.local.address), passed.local.port) == peer.getpeername()
        assert passed.socket.gettimeout() is None
        assert "state" not in repr(passed)
        peer.sendall(b"question")
        assert passed.socket.recv(8, socket.MSG_WAITALL) == b"question"
        passed.socket.close()
        assert peer.recv(1) == b""
    assert not receiver.path.exists()


def test_what_was_handed_out_outlives_the_tool_and_the_receiver(pair: Pair) -> None:
    ours, peer = pair
    with Receiver(port=9000) as receiver, tool(receiver.path) as serve:
        offer(serve, "a" * 16, ours)
        serve.send({"op": "active", "id": "a" * 16})
        passed = receiver.accept(10)
    with passed.socket as sock:
        sock.sendall(b"x")
        assert peer.recv(1) == b"x"


def test_iteration_gives_all_and_ends_when_it_is_closed(pair: Pair) -> None:
    ours, _peer = pair
    receiver = Receiver(port=9000)
    got: list[str] = []

    def serve_all() -> None:
        for passed in receiver:
            got.append(passed.id)
            passed.socket.close()

    thread = threading.Thread(target=serve_all)
    thread.start()
    with tool(receiver.path) as serve:
        for number in range(20):
            offer(serve, f"{number:016x}", ours)
            serve.send({"op": "active", "id": f"{number:016x}"})
        until(lambda: len(got) == 20, "all")
    receiver.close()
    receiver.close()
    thread.join(10)
    assert not thread.is_alive()
    assert got == [f"{number:016x}" for number in range(20)]
    with pytest.raises(EOFError):
        receiver.accept(0)


def test_aborted_it_is_closed_and_never_handed_out(pair: Pair) -> None:
    ours, peer = pair
    with Receiver(port=9000) as receiver, tool(receiver.path) as serve:
        offer(serve, "a" * 16, ours)
        settled(serve)
        ours.close()
        serve.send({"op": "abort", "id": "a" * 16})
        assert peer.recv(1) == b""  # the last copy of it is gone
        serve.send({"op": "active", "id": "a" * 16})
        settled(serve)
        with pytest.raises(TimeoutError):
            receiver.accept(0)


def test_a_later_tool_claims_what_is_alive(pair: Pair) -> None:
    """The first serve died after repair was left: the connection is kept for the next one."""
    ours, peer = pair
    with Receiver(port=9000) as receiver:
        with tool(receiver.path) as first:
            offer(first, "a" * 16, ours)
            settled(first)
        ours.close()
        with tool(receiver.path) as second:
            assert second.ask({"op": "claim", "id": "b" * 16}) == ({"op": "unknown"}, [])
            answer, descriptors = second.ask({"op": "claim", "id": "a" * 16})
            assert answer == {"op": "held"}
            with socket.socket(fileno=descriptors[0]) as claimed:
                claimed.sendall(b"x")
                assert peer.recv(1) == b"x"
            second.send({"op": "active", "id": "a" * 16})
            with receiver.accept(10).socket as sock:
                sock.sendall(b"y")
                assert peer.recv(1) == b"y"


@pytest.mark.root
def test_what_is_dormant_dies_with_its_tool_in_silence(pair: Pair) -> None:
    ours, peer = pair
    with Receiver(port=9000) as receiver:
        with tool(receiver.path) as serve:
            offer(serve, "a" * 16, ours)
            settled(serve)
            ours.setsockopt(socket.IPPROTO_TCP, 19, 1)  # TCP_REPAIR
            ours.close()
        with tool(receiver.path) as second:
            assert second.ask({"op": "claim", "id": "a" * 16}) == ({"op": "unknown"}, [])
    peer.setblocking(False)
    with pytest.raises(BlockingIOError):
        peer.recv(1)


@pytest.mark.parametrize("flow", [None, {}, [], "x", {"local": ["127.0.0.1", 0]}])
def test_an_offer_without_a_flow_is_turned_down_and_closed(flow: Any, pair: Pair) -> None:
    ours, peer = pair
    with Receiver(port=9000) as receiver:
        with tool(receiver.path) as serve:
            offer(serve, "a" * 16, ours, flow=flow)
            ours.close()
            with pytest.raises(Gone):
                serve.receive()
        assert peer.recv(1) == b""
        with tool(receiver.path) as another:
            settled(another)


@pytest.mark.parametrize("data", [b"", b"x", b"{", b"[]", b"1", b"\xff", b'{"op":"dance"}', b'{"op":1}', b'{"op":[]}',
                                  b"{}", b'{"op":"offer"}', b'{"op":"active"}', b'{"op":"abort","id":[]}', b"[" * 9000])
def test_nonsense_does_not_end_the_receiver(data: bytes) -> None:
    with Receiver(port=9000) as receiver:
        with tool(receiver.path) as serve:
            serve.socket.send(data)
        with tool(receiver.path) as another:
            settled(another)


def test_descriptors_that_came_with_nonsense_are_closed(pair: Pair) -> None:
    ours, _peer = pair
    with Receiver(port=9000) as receiver, tool(receiver.path) as serve:
        settled(serve)
        before = len(os.listdir("/proc/self/fd"))
        for count in (1, 2, 3, 4):
            for word in ("dance", "ping", "active", "abort", "claim"):
                serve.send({"op": word, "id": "a" * 16}, [ours.fileno()] * count)
                if word in ("ping", "claim"):
                    serve.receive()
            serve.send({"op": "offer", "id": "a" * 16}, [ours.fileno()] * (1 if count == 2 else count))
            settled(serve)
        assert len(os.listdir("/proc/self/fd")) == before


def test_an_offer_whose_state_is_no_memory_is_turned_down(pair: Pair) -> None:
    """A pipe for the state: the tool must not be able to end the application."""
    ours, _peer = pair
    reader, writer = os.pipe()
    with Receiver(port=9000) as receiver:
        with tool(receiver.path) as serve:
            serve.send({"op": "offer", "id": "a" * 16, "flow": Flow.of_socket(ours).to_json()}, [ours.fileno(), reader])
        with tool(receiver.path) as another:
            settled(another)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("what", ["a pipe", "a file", "a unix socket", "a UDP socket"])
def test_an_offer_of_something_else_is_turned_down_and_closed(what: str, tmp_path: Path, pair: Pair) -> None:
    """When the conversation ends, the receiver asks each dormant connection how it is: none may be anything else."""
    ours, _peer = pair
    with contextlib.ExitStack() as stack:
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        file = stack.enter_context(open(tmp_path / "file", "wb"))
        unix, udp = (stack.enter_context(socket.socket(*kind)) for kind in (
            (socket.AF_UNIX, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM)))
        thing = {"a pipe": reader, "a file": file.fileno(), "a unix socket": unix.fileno(),
                 "a UDP socket": udp.fileno()}[what]
        with Receiver(port=9000) as receiver:
            with tool(receiver.path) as first:
                settled(first)
                before = len(os.listdir("/proc/self/fd"))
            with tool(receiver.path) as serve:
                state = apps.wrap_state(b"")
                serve.send({"op": "offer", "id": "a" * 16, "flow": Flow.of_socket(ours).to_json()}, [thing, state])
                os.close(state)
                with pytest.raises(Gone):
                    serve.receive()
            with tool(receiver.path) as another:
                settled(another)
                assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("seals", [None, 0, 0x7])
def test_a_state_that_can_still_be_changed_is_not_read(seals: int | None, tmp_path: Path) -> None:
    """Nor any other file: of one in a FUSE its reader could wait for ever."""
    if seals is None:
        descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    else:
        descriptor = os.memfd_create("state", os.MFD_ALLOW_SEALING)
    os.write(descriptor, b"state")
    if seals is not None:
        fcntl.fcntl(descriptor, 1033, seals)  # F_ADD_SEALS
    with pytest.raises(Gone):
        apps.unwrap_state(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert apps.unwrap_state(apps.wrap_state(b"state")) == b"state"


def test_a_link_does_not_lead_to_another_application(run_dir: Path) -> None:
    """Any user may make files beside the sockets."""
    with Receiver(port=443) as receiver:
        planted = run_dir / "apps" / "port-9000.1.sock"
        planted.symlink_to(receiver.path)
        assert list(apps.receivers(9000)) == []
        assert list(apps.receivers(443)) == [receiver.path]
        planted.unlink(missing_ok=True)
        planted.symlink_to(receiver.path)
        with pytest.raises(Gone):
            apps.connect(planted, 5)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 40 << 20])
def test_a_large_state_of_the_application_arrives_whole(size: int, pair: Pair) -> None:
    ours, _peer = pair
    state = os.urandom(1024) * (size >> 10) or b"x" * size
    with Receiver(port=9000) as receiver, tool(receiver.path) as serve:
        offer(serve, "a" * 16, ours, state)
        serve.send({"op": "active", "id": "a" * 16})
        passed = receiver.accept(20)
        assert passed.app_state == state
        passed.socket.close()


def test_two_receivers_of_one_port_have_a_file_each(run_dir: Path) -> None:
    script = ("import sys\nfrom criu_tcpcp.application import Receiver\nwith Receiver(port=9000):\n"
              "    print('ready', flush=True)\n    sys.stdin.readline()\n")
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == b"ready\n"
        with Receiver(port=9000) as mine, Receiver(port=9001):
            assert set(apps.receivers(9000)) == {mine.path, run_dir / "apps" / f"port-9000.{other.pid}.sock"}
            with pytest.raises(Refused):  # of one process there can be only one
                Receiver(port=9000)
            with tool(mine.path) as serve:
                settled(serve)
            other.kill()
            other.wait()
            assert set(apps.receivers(9000)) == {mine.path}
            assert not (run_dir / "apps" / f"port-9000.{other.pid}.sock").exists(), "its process is dead"
    assert list(apps.receivers(9000)) == []


def test_a_stale_file_is_replaced_and_a_foreign_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "mine.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    with Receiver(path=path) as receiver, tool(receiver.path) as serve:
        settled(serve)
    path.write_text("precious")
    with pytest.raises(Refused):
        Receiver(path=path)
    assert path.read_text() == "precious"


def test_a_receiver_has_a_port_or_a_path() -> None:
    for arguments in ({}, {"port": 1, "path": "/x"}):
        with pytest.raises(UsageError):
            Receiver(**arguments)  # type: ignore[arg-type]


def as_nobody(script: str, run_dir: Path) -> subprocess.Popen[str]:
    """Runs it as nobody, who can reach the run directory and this project, and nothing else."""
    for parent in [run_dir, *run_dir.parents]:
        if parent.owner() == "root" and str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    prelude = ("import sys\nfrom criu_tcpcp import application, apps\nfrom criu_tcpcp.application import *\n"
               f"import os\nos.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n")
    return subprocess.Popen([sys.executable, "-c", prelude + script], text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.root
def test_another_user_is_not_listened_to(run_dir: Path) -> None:
    with Receiver(port=9000) as receiver:
        receiver.path.chmod(0o666)  # even where the file lets him
        with as_nobody(f"""
from pathlib import Path
conversation = apps.connect(Path({str(receiver.path)!r}), 5)
try:
    print(conversation.ask({{"op": "ping"}}))
except apps.Gone:
    print("turned away")
""", run_dir) as other:
            assert other.communicate(timeout=20) == ("turned away\n", "")


@pytest.mark.root
def test_an_application_without_rights_can_receive(run_dir: Path, pair: Pair) -> None:
    ours, peer = pair
    with as_nobody("""
with Receiver(port=9000) as receiver:
    print("ready", flush=True)
    passed = receiver.accept(20)
    passed.socket.sendall(b"from " + passed.app_state)
""", run_dir) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        (path,) = apps.receivers(9000)
        with tool(path) as serve:
            assert serve.peer() == (other.pid, NOBODY)
            offer(serve, "a" * 16, ours, b"nobody")
            serve.send({"op": "active", "id": "a" * 16})
            assert peer.recv(11, socket.MSG_WAITALL) == b"from nobody"
        assert other.communicate(timeout=20)[1] == ""
    assert list((run_dir / "apps").iterdir()) == []


@pytest.mark.root
def test_without_the_directory_an_application_gets_one_clear_line(run_dir: Path) -> None:
    (run_dir / "apps").rmdir()
    with as_nobody("""
try:
    Receiver(port=9000)
except application.Refused as error:
    print(error)
""", run_dir) as other:
        out, err = other.communicate(timeout=20)
    assert err == ""
    assert len(out.splitlines()) == 1
    assert str(run_dir / "apps") in out
    assert "criu-tcpcp check" in out


# -- register ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def registered(pair: Pair) -> Iterator[dict[str, Any]]:
    """A registered connection; what its callbacks heard."""
    heard: dict[str, Any] = {"calls": [], "state": b"half a request", "cookie": tcpinfo.cookie(pair[0]),
                             "sock": pair[0]}

    def quiesce() -> bytes:
        heard["calls"].append("quiesce")
        if isinstance(heard["state"], Exception):
            raise heard["state"]
        return heard["state"]

    registration = register(pair[0], quiesce, resumed=lambda: heard["calls"].append("resumed"),
                            passed=lambda: heard["calls"].append("passed"))
    yield heard
    registration.close()
    assert not apps.registration_path(os.getpid()).exists()


def test_only_what_is_registered_is(registered: dict[str, Any]) -> None:
    with tool(apps.registration_path(os.getpid())) as keeper:
        assert keeper.ask({"op": "registered", "cookie": registered["cookie"]})[0] == {"op": "yes"}
        assert keeper.ask({"op": "registered", "cookie": NOT_REGISTERED})[0] == {"op": "no"}
        assert keeper.ask({"op": "quiesce", "cookie": NOT_REGISTERED})[0]["op"] == "error"
        assert keeper.ask({"op": "resumed", "cookie": registered["cookie"]})[0]["op"] == "error"
    with pytest.raises(Refused):
        register(registered["sock"], bytes)
    assert registered["calls"] == []


@pytest.mark.parametrize("end", ["passed", "resumed"])
def test_quiesced_and_settled(end: str, registered: dict[str, Any]) -> None:
    with tool(apps.registration_path(os.getpid())) as keeper:
        answer, descriptors = keeper.ask({"op": "quiesce", "cookie": registered["cookie"]})
        assert answer == {"op": "quiesced"}
        assert apps.unwrap_state(descriptors[0]) == b"half a request"
        keeper.send({"op": end, "cookie": registered["cookie"]})
        until(lambda: registered["calls"] == ["quiesce", end], end)
    with tool(apps.registration_path(os.getpid())) as keeper:  # hung up after it was settled: told once
        keeper.ask({"op": "registered", "cookie": NOT_REGISTERED})
    assert registered["calls"] == ["quiesce", end]


def test_a_tool_that_dies_leaves_the_application_running(registered: dict[str, Any]) -> None:
    with tool(apps.registration_path(os.getpid())) as keeper:
        answer, descriptors = keeper.ask({"op": "quiesce", "cookie": registered["cookie"]})
        os.close(descriptors[0])
        assert answer["op"] == "quiesced"
    until(lambda: registered["calls"] == ["quiesce", "resumed"], "resumed")


def test_a_tool_that_dies_after_the_connection_ended_says_passed(registered: dict[str, Any]) -> None:
    with tool(apps.registration_path(os.getpid())) as keeper:
        _answer, descriptors = keeper.ask({"op": "quiesce", "cookie": registered["cookie"]})
        os.close(descriptors[0])
        with contextlib.suppress(OSError):
            registered["sock"].shutdown(socket.SHUT_RDWR)
        ctypes.CDLL(None).connect(registered["sock"].fileno(), bytes(16), 16)  # AF_UNSPEC: as the tool ends it
    until(lambda: registered["calls"] == ["quiesce", "passed"], "passed")


def test_an_application_that_cannot_be_quiesced_says_why(registered: dict[str, Any]) -> None:
    registered["state"] = ValueError("in the middle of something")
    with tool(apps.registration_path(os.getpid())) as keeper:
        answer, descriptors = keeper.ask({"op": "quiesce", "cookie": registered["cookie"]})
        assert answer == {"op": "error", "error": "ValueError: in the middle of something"}
        assert descriptors == []
        assert keeper.ask({"op": "registered", "cookie": registered["cookie"]})[0] == {"op": "yes"}
    assert registered["calls"] == ["quiesce"]


def test_a_quiesce_that_returns_no_bytes_is_an_error_and_no_end(registered: dict[str, Any]) -> None:
    registered["state"] = None
    with tool(apps.registration_path(os.getpid())) as keeper:
        assert keeper.ask({"op": "quiesce", "cookie": registered["cookie"]})[0]["op"] == "error"
    with tool(apps.registration_path(os.getpid())) as keeper:
        assert keeper.ask({"op": "registered", "cookie": registered["cookie"]})[0] == {"op": "yes"}


@pytest.mark.parametrize("cookie", [None, "x", [], {}, 1.5, True])
def test_a_cookie_that_is_none_is_not_registered(cookie: Any, registered: dict[str, Any]) -> None:
    with tool(apps.registration_path(os.getpid())) as keeper:
        keeper.send({"op": "registered", "cookie": cookie})
        with contextlib.suppress(Gone):
            assert keeper.receive()[0]["op"] in ("no", "error")
    with tool(apps.registration_path(os.getpid())) as keeper:
        assert keeper.ask({"op": "registered", "cookie": registered["cookie"]})[0] == {"op": "yes"}


def test_a_callback_that_fails_does_not_end_the_conversation(pair: Pair,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)

    def fail() -> None:
        raise RuntimeError("the application's own")

    registration = register(pair[0], lambda: b"", resumed=fail)
    cookie = tcpinfo.cookie(pair[0])
    with tool(apps.registration_path(os.getpid())) as keeper:
        _answer, descriptors = keeper.ask({"op": "quiesce", "cookie": cookie})
        os.close(descriptors[0])
        keeper.send({"op": "resumed", "cookie": cookie})
    with tool(apps.registration_path(os.getpid())) as keeper:
        assert keeper.ask({"op": "registered", "cookie": cookie})[0] == {"op": "yes"}
    registration.close()
    assert seen == []


def test_a_registration_may_end_while_its_quiesce_waits_for_who_ends_it(pair: Pair) -> None:
    """A worker that finds its peer gone closes what a quiesce wants to bring to rest."""
    asked, ended = threading.Event(), threading.Event()

    def quiesce() -> bytes:
        asked.set()
        if not ended.wait(20):
            raise TimeoutError("the worker does not end")
        return b""

    registration = register(pair[0], quiesce)

    def work() -> None:
        asked.wait(20)
        registration.close()
        ended.set()

    worker = threading.Thread(target=work)
    worker.start()
    with tool(apps.registration_path(os.getpid())) as keeper:
        answer, descriptors = keeper.ask({"op": "quiesce", "cookie": tcpinfo.cookie(pair[0])})
        for descriptor in descriptors:
            os.close(descriptor)
        assert answer == {"op": "quiesced"}
    worker.join(20)
    assert not worker.is_alive()


def test_a_registration_may_end_in_the_callback_of_its_pass(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that calls back is the one that ends with the last registration."""
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    done = threading.Event()

    def leave() -> None:
        thread.append(threading.current_thread())
        registration.close()
        done.set()

    thread: list[threading.Thread] = []
    registration = register(pair[0], lambda: b"", passed=leave)
    cookie = tcpinfo.cookie(pair[0])
    with tool(apps.registration_path(os.getpid())) as keeper:
        _answer, descriptors = keeper.ask({"op": "quiesce", "cookie": cookie})
        os.close(descriptors[0])
        keeper.send({"op": "passed", "cookie": cookie})
        assert done.wait(20)
        thread[0].join(20)
        assert not thread[0].is_alive()
        with pytest.raises(Gone):
            keeper.receive()
    assert seen == []
    assert not apps.registration_path(os.getpid()).exists()


def test_after_a_fork_the_child_registers_for_itself(pair: Pair) -> None:
    """A server that registers, forks, and registers in the child: each has its own file."""
    registration = register(pair[0], bytes)
    mine = apps.registration_path(os.getpid())
    script = """if True:
        import os, signal, socket, sys
        from criu_tcpcp.application import register
        a, b = socket.socketpair()
        first = register(a, bytes)
        child = os.fork()
        if child == 0:
            second = register(b, bytes)
            from criu_tcpcp import apps
            os._exit(0 if apps.registration_path(os.getpid()).exists() else 1)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert subprocess.run([sys.executable, "-c", script], timeout=20, check=False).returncode == 0
    assert mine.exists()
    registration.close()
    assert not mine.exists()
