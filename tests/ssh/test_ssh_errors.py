"""What a user reads when the destination cannot be reached over SSH; and that what the line advises helps."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from criu_tcpcp.core.errors import LinkError
from criu_tcpcp.transport.link import Link, open_link
from criu_tcpcp.transport.target import Target
from waiting import until

pytestmark = pytest.mark.root


@pytest.fixture(autouse=True)
def _no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture
def echo(ssh_target: Target) -> Target:
    """A target that answers with what it is sent."""
    return replace(ssh_target, remote_command="exec cat #")


def works(target: Target) -> str | None:
    """Whether a byte comes back; the address that was reached."""
    with open_link(target) as link:
        link.socket.settimeout(20)
        link.socket.sendall(b"x")
        assert link.socket.recv(1) == b"x", link.diagnosis()
        return link.peer_address


def complaint(target: Target, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of the error that reaching the target ends in; nothing else was printed, no process is left."""
    with pytest.raises(LinkError) as caught:
        open_link(target)
    line = str(caught.value)
    assert "\n" not in line
    assert capfd.readouterr() == ("", "")
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert "tcpcp-link" not in [Path(f"/proc/{pid}/comm").read_text().strip() for pid in children]
    return line


def failure(target: Target) -> LinkError:
    """The error that a user makes out of an end before the first byte."""
    with open_link(target) as link:
        _expect_end(link)
        return link.failure()


def _expect_end(link: Link) -> None:
    link.socket.settimeout(20)
    with contextlib.suppress(ConnectionResetError):
        assert link.socket.recv(1) == b""


def _key(path: Path, passphrase: str = "") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", path], check=True)
    return path


@pytest.mark.parametrize("host", ["no-such-host..invalid", "::1"])
def test_no_such_host(echo: Target, tmp_path: Path, host: str, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config").write_text("AddressFamily inet\n")  # in which ::1 has no address
    line = complaint(replace(echo, host=host, ssh_config=str(tmp_path / "config")), capfd)
    assert line.startswith(f"{host}: no such host: ")


def test_refused(echo: Target, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:  # which does not listen
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        line = complaint(replace(echo, port=port), capfd)
    assert line.startswith(f"127.0.0.1 port {port}: connection refused (is sshd running there")


def test_no_answer_to_the_connection(echo: Target, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):  # fills the queue: the next SYN is dropped
            line = complaint(replace(echo, port=full.getsockname()[1], timeout_s=0.3), capfd)
    assert "no answer in time (--timeout waits longer)" in line


def test_no_answer_to_ssh(echo: Target, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        line = complaint(replace(echo, port=silent.getsockname()[1], timeout_s=0.3), capfd)
        assert time.monotonic() - begin < 3
    assert "no SSH connection" in line or "no connection within 0.3 s" in line


def test_something_else_than_ssh(echo: Target, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            end, _ = server.accept()
            with end:
                end.recv(100)
                end.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        line = complaint(replace(echo, port=server.getsockname()[1]), capfd)
        thread.join()
    assert "no SSH connection" in line


@pytest.mark.parametrize("hashed", [False, True])
def test_unknown_host_key(echo: Target, tmp_path: Path, hashed: bool, capfd: pytest.CaptureFixture[str]) -> None:
    known = tmp_path / "known_hosts"
    target = replace(echo, known_hosts=str(known))
    line = complaint(target, capfd)
    assert f"add this line to {known}: " in line
    known.write_text(line.partition(f"{known}: ")[2] + "\n")
    if hashed:
        subprocess.run(["ssh-keygen", "-q", "-H", "-f", known], check=True, stderr=subprocess.DEVNULL)
        assert "127.0.0.1" not in known.read_text()
    assert works(target) == "127.0.0.1"
    assert capfd.readouterr().err == ""


def test_changed_host_key(echo: Target, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{echo.port} {_key(tmp_path / 'other').with_suffix('.pub').read_text()}")
    line = complaint(replace(echo, known_hosts=str(known)), capfd)
    assert "THE HOST KEY HAS CHANGED" in line
    assert f"{known}:1" in line


def test_wrong_key(echo: Target, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = str(_key(tmp_path / "wrong"))
    line = complaint(replace(echo, identity_files=(wrong,)), capfd)
    assert re.search(rf"authentication failed; keys tried: {wrong} \(name a key with -i", line)
    assert works(replace(echo, identity_files=(wrong, *echo.identity_files)))


def test_no_key_at_all(
    echo: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    target = replace(echo, identity_files=())
    assert "keys tried: none" in complaint(target, capfd)
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519").write_bytes(Path(echo.identity_files[0]).read_bytes())
    assert works(target)


def test_key_file_that_is_missing(echo: Target, capfd: pytest.CaptureFixture[str]) -> None:
    assert complaint(replace(echo, identity_files=("/no/such/key",)), capfd) == "key file /no/such/key does not exist"


def test_key_file_that_is_none(echo: Target, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("text")
    line = complaint(replace(echo, identity_files=(f"{tmp_path}/text",)), capfd)
    assert line == f"key file {tmp_path}/text cannot be used: not a private key"


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A running SSH agent that holds nothing."""
    path = tmp_path / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL) as process:
        until(path.exists)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        yield
        process.terminate()


@pytest.mark.usefixtures("agent")
def test_encrypted_key_and_agent(echo: Target, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    locked = tmp_path / "locked"
    locked.write_bytes(Path(echo.identity_files[0]).read_bytes())
    locked.chmod(0o600)
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", locked], check=True, stdout=subprocess.DEVNULL)
    target = replace(echo, identity_files=(str(locked),))
    assert f"unusable: {locked} (encrypted, and the SSH agent does not hold it)" in complaint(target, capfd)
    subprocess.run(["ssh-add", "-q", echo.identity_files[0]], check=True)
    assert works(target)
    assert works(replace(echo, identity_files=()))


def test_configuration_file_that_is_missing(echo: Target, capfd: pytest.CaptureFixture[str]) -> None:
    assert "/no/such/config: No such file" in complaint(replace(echo, ssh_config="/no/such/config"), capfd)


def test_command_that_is_missing(ssh_target: Target) -> None:
    error = failure(replace(ssh_target, remote_command="no-such-command"))
    assert error.message.startswith("`no-such-command` was not found on root@127.0.0.1:")
    assert "--remote-command" in error.hint
    assert "pip install" in error.hint


def test_command_that_sudo_does_not_find(ssh_target: Target) -> None:
    error = failure(replace(ssh_target, remote_command="echo sudo: criu-tcpcp: command not found >&2; exit 1 #"))
    assert "was not found" in error.message


def test_command_that_is_no_program(ssh_target: Target, tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    assert "cannot be executed" in str(failure(replace(ssh_target, remote_command=f"{tmp_path}/data")))


def test_command_that_ends_at_once(ssh_target: Target) -> None:
    error = failure(replace(ssh_target, remote_command="echo first >&2; echo no policy >&2; exit 3 #"))
    assert "ended at once with status 3: no policy" in str(error)


def test_connection_that_breaks(ssh_target: Target) -> None:
    with open_link(replace(ssh_target, remote_command="read line; kill -9 $PPID; sleep 20 #")) as link:
        link.socket.sendall(b"now\n")
        _expect_end(link)
        assert link.diagnosis().startswith("the SSH connection broke")


def _config(place: Path, echo: Target, text: str) -> Target:
    """The echo under the name `dest`, with this beside what leads to it."""
    common = f"Host dest jump dead\n HostName 127.0.0.1\nHost dest jump\n Port {echo.port}\n"
    (place / "config").write_text(f"{common}{text}")
    return replace(echo, host="dest", port=None, ssh_config=str(place / "config"))


def test_jump_hosts(echo: Target, tmp_path: Path) -> None:
    assert works(_config(tmp_path, echo, "Host dest\n ProxyJump root@jump,root@127.0.0.1:%p\n")) is None


def test_jump_host_that_does_not_answer(echo: Target, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        line = complaint(_config(tmp_path, echo, f"Host dest\n ProxyJump dead:{port}\n"), capfd)
        assert line.startswith(f"127.0.0.1 port {port}: connection refused")
        line = complaint(replace(_config(tmp_path, echo, "Host dest\n ProxyJump jump\n"), port=port), capfd)
        assert "the jump host does not get there: " in line


def test_proxy_command(echo: Target, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = f"-F /dev/null -i {echo.identity_files[0]} -o UserKnownHostsFile={echo.known_hosts}"
    target = _config(tmp_path, echo, f"Host dest\n ProxyCommand ssh {options} -p %p -W %h:%p %r@%h\n")
    assert works(target) is None
    line = complaint(_config(tmp_path, echo, "Host dest\n ProxyCommand echo no way >&2; exit 1\n"), capfd)
    assert line.endswith("its ProxyCommand: no way")
