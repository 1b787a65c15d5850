"""The contract of a link, on both its kinds: over SSH (a real sshd on loopback) and to a command of this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from criu_tcpcp.core.errors import LinkError
from criu_tcpcp.transport.link import Link, open_link
from criu_tcpcp.transport.target import LocalTarget, Target
from waiting import until

pytestmark = pytest.mark.root

_PATIENCE_S = 20.0

Far = Callable[[str], Target | LocalTarget]


@pytest.fixture(params=["ssh", "local"])
def far(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Far]:
    """Makes a target out of a shell command; what the command leaves running at this machine is ended."""
    pids = tmp_path / "pids"
    pids.touch()

    def make(command: str) -> Target | LocalTarget:
        if request.param == "local":
            return LocalTarget(("sh", "-c", f"echo $$ >> {shlex.quote(str(pids))}; {command}"))
        ssh: Target = request.getfixturevalue("ssh_target")
        quoted = f"sh -c {shlex.quote(command)}"
        return Target(ssh.host, ssh.user, ssh.port, ssh.identity_files, ssh.ssh_config, ssh.known_hosts, quoted)

    yield make
    for pid in pids.read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def _read_to_end(link: Link) -> bytes:
    """Everything until the end, which may show as a reset where bytes of ours were left unread."""
    link.socket.settimeout(_PATIENCE_S)
    data = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while chunk := link.socket.recv(1 << 20):
            data += chunk
    return bytes(data)


def _read(link: Link, size: int) -> bytes:
    link.socket.settimeout(_PATIENCE_S)
    data = bytearray()
    while len(data) < size:
        chunk = link.socket.recv(min(size - len(data), 1 << 20))
        assert chunk, f"the end after {len(data)} of {size} bytes: {link.diagnosis()}"
        data += chunk
    return bytes(data)


def test_bytes_go_both_ways(far: Far) -> None:
    with open_link(far("exec cat")) as link:
        for size in (1, 200, 4096, 70000):
            message = random.Random(size).randbytes(size)
            link.socket.sendall(message)
            assert _read(link, size) == message
        assert link.diagnosis() == ""


def test_bulk_both_ways_at_once(far: Far) -> None:
    block = random.Random(1).randbytes(1 << 20)
    sent, received = hashlib.sha256(), hashlib.sha256()
    with open_link(far("exec cat")) as link:

        def send() -> None:
            for number in range(32):
                message = number.to_bytes(4, "big") + block[4:]
                sent.update(message)
                link.socket.sendall(message)

        sender = threading.Thread(target=send)
        sender.start()
        for _ in range(32):
            received.update(_read(link, 1 << 20))
        sender.join()
    assert received.digest() == sent.digest()


def test_end_of_the_far_command_is_eof(far: Far) -> None:
    with open_link(far("echo some words >&2; printf bytes; exit 3")) as link:
        assert _read_to_end(link) == b"bytes"
        assert "status 3" in str(link.failure())
        assert link.diagnosis().endswith("ended with status 3; its last words: some words")


def test_half_close(far: Far) -> None:
    with open_link(far("cat; printf end")) as link:
        link.socket.sendall(b"x" * 100000)
        link.socket.shutdown(socket.SHUT_WR)
        assert _read_to_end(link) == b"x" * 100000 + b"end"


def test_stderr_is_kept_apart_and_bounded(far: Far) -> None:
    with open_link(far("seq 100000 >&2; printf '\\033[2J' >&2; printf out")) as link:
        assert _read_to_end(link) == b"out"
        link.failure()
        assert link.diagnosis().endswith("99999 | 100000 | \\x1b[2J")


def test_missing_command(far: Far) -> None:
    with open_link(far("exec no-such-command-here")) as link:
        assert _read_to_end(link) == b""
        error = link.failure()
    assert isinstance(error, LinkError)
    assert "was not found" in error.message
    assert "--remote-command" in error.hint


def test_close_while_the_far_command_hangs(far: Far) -> None:
    link = open_link(far("printf x; exec sleep 1000"))
    assert _read(link, 1) == b"x"
    begin = time.monotonic()
    link.close()
    assert time.monotonic() - begin < 3
    assert not Path(f"/proc/{link.pid}").exists()
    link.close()


def test_close_when_the_far_command_never_reads(far: Far) -> None:
    link = open_link(far("printf x; exec sleep 1000"))
    assert _read(link, 1) == b"x"
    link.socket.settimeout(0.2)
    everything = bytes(64 << 20)
    with pytest.raises(TimeoutError):
        link.socket.sendall(everything)
    begin = time.monotonic()
    link.close()
    assert time.monotonic() - begin < 3


def test_what_was_written_before_close_arrives(far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine both times are soon over, and 300 kB may be on their way still.
    monkeypatch.setattr("criu_tcpcp.transport.link._CLOSE_S", _PATIENCE_S)
    monkeypatch.setattr("criu_tcpcp.transport.ssh.DRAIN_S", _PATIENCE_S)
    message = random.Random(2).randbytes(300000)
    with open_link(far(f"cat > {shlex.quote(str(tmp_path / 'copy'))}")) as link:
        link.socket.sendall(message)
    copy = tmp_path / "copy"
    until(lambda: copy.exists() and copy.read_bytes() == message)


def test_link_process_ends_with_its_user(far: Far) -> None:
    script = """if True:
        import json, os, signal, sys
        from criu_tcpcp.transport import link, target
        made = link.open_link(target.target_from_json(json.loads(sys.argv[1])))
        assert "paramiko" not in sys.modules
        print(made.pid, flush=True)
        signal.pause()
    """
    argv = [sys.executable, "-c", script, json.dumps(far("exec sleep 1000").to_json())]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        pidfd = os.pidfd_open(int(user.stdout.readline()))
        user.kill()
    try:
        assert select.select([pidfd], [], [], _PATIENCE_S)[0]
    finally:
        os.close(pidfd)


def test_end_of_the_link_process_is_the_end(far: Far) -> None:
    with open_link(far("printf x; exec cat")) as link:
        assert _read(link, 1) == b"x"
        os.kill(link.pid, signal.SIGKILL)
        if isinstance(link.failure(), LinkError):  # of a local command the bytes do not pass through it
            assert "link process died" in link.diagnosis()


def test_link_process_is_nothing_of_its_parent(far: Far) -> None:
    reader, writer = os.pipe()
    with open_link(far("exec cat")) as link:
        os.close(writer)
        assert os.read(reader, 1) == b""  # it has no copy of the other end
        os.close(reader)
        assert Path(f"/proc/{link.pid}/comm").read_text() == "tcpcp-link\n"
        assert os.getsid(link.pid) == link.pid
        os.kill(link.pid, signal.SIGINT)
        link.socket.sendall(b"x")
        assert _read(link, 1) == b"x"


def test_caller_without_stdio(far: Far) -> None:
    script = """if True:
        import json, os, sys
        os.closerange(0, 2)
        from criu_tcpcp.transport import link, target
        with link.open_link(target.target_from_json(json.loads(sys.argv[1]))) as made:
            made.socket.sendall(b"x")
            os._exit(made.socket.recv(1)[0])
    """
    argv = [sys.executable, "-c", script, json.dumps(far("exec cat").to_json())]
    assert subprocess.run(argv, check=False).returncode == ord("x")


def test_address_that_was_reached(ssh_target: Target) -> None:
    with open_link(ssh_target) as link:
        assert link.peer_address == "127.0.0.1"
    with open_link(LocalTarget(("cat",))) as link:
        assert link.peer_address is None


def test_local_command_that_does_not_exist() -> None:
    with pytest.raises(LinkError, match="`/no/such/command` was not found"):
        open_link(LocalTarget(("/no/such/command",)))


def test_local_command_in_its_namespace_and_environment() -> None:
    command = ("sh", "-c", "readlink /proc/self/ns/net; echo $WORD; cat")
    unshare = ["unshare", "--net", "sh", "-c", "readlink /proc/self/ns/net; exec cat"]
    with subprocess.Popen(unshare, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        namespace = other.stdout.readline()
        with open_link(LocalTarget(command, f"/proc/{other.pid}/ns/net", {"WORD": "word"})) as link:
            link.socket.shutdown(socket.SHUT_WR)
            assert _read_to_end(link) == namespace + b"word\n"
        other.stdin.close()
    with pytest.raises(LinkError, match="/no/such/namespace"):
        open_link(LocalTarget(command, "/no/such/namespace"))
