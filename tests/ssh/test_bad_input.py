"""What cannot be done is said in one line, with the right exit status, and nothing was touched."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attempt import Attempt, conversation, exchange, state
from criu_tcpcp import __version__
from criu_tcpcp.lab import Host, leftovers
from waiting import until
from world import COMMAND, World

pytestmark = pytest.mark.root

NOBODY = 65534
USAGE, REFUSED = 2, 3

#: A process with one of everything that is not a connection to another host; it says the descriptors.
ZOO = """if True:
    import os, socket, time
    file, pipe = open("/etc/hostname"), os.pipe()
    unix, udp, fresh = socket.socketpair(), socket.socket(type=socket.SOCK_DGRAM), socket.socket()
    packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    listener = socket.create_server(("127.0.0.1", 0))
    loopback = socket.create_connection(listener.getsockname())
    try:
        mptcp = socket.socket(type=socket.SOCK_STREAM, proto=262).detach()
    except OSError:
        mptcp = -1
    for name in ("file", "unix", "udp", "fresh", "packet", "listener", "loopback", "mptcp"):
        thing = globals()[name]
        thing = thing[0] if isinstance(thing, tuple) else thing
        print(name, thing if isinstance(thing, int) else thing.fileno())
    print("pipe", pipe[0])
    print("end", flush=True)
    time.sleep(1000)
"""


class Bystanders:
    """A conversation that none of this may disturb, and what else there is on its hosts."""

    def __init__(self, here: World, peer: socket.socket) -> None:
        self.here, self.peer = here, peer
        self.zoo = here.lab.origin.spawn([sys.executable, "-c", ZOO], stdout=subprocess.PIPE, text=True)
        assert self.zoo.stdout is not None
        self.descriptors = {name: int(number) for name, number in
                            (line.split() for line in iter(self.zoo.stdout.readline, "end\n"))}
        self.before = {host.name: leftovers(host) for host in (here.lab.origin, here.lab.destination)}

    def pass_argv(self, *, pid: int | None = None, fd: int | None = None, ssh: list[str] | None = None) -> list[str]:
        here = self.here
        return ["pass", "--pid", str(here.node.process.pid if pid is None else pid),
                "--fd", str(here.descriptor() if fd is None else fd),
                *(here.lab.ssh_options(here.lab.destination) if ssh is None else ssh)]

    def refuses(self, argv: list[str], status: int, *words: str, env: dict[str, str] | None = None) -> str:
        """The line with which the command ends; every one of `words` is in it."""
        done = self.here.lab.origin.run([COMMAND, *argv], check=False, env=env)
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert done.returncode == status, line
        assert line.startswith("criu-tcpcp: ")
        for word in words:
            assert word in line
        return line


@pytest.fixture(scope="module")
def world_of_all() -> Iterator[Bystanders]:
    with conversation(register=False, captured=False) as (here, peer):
        exchange(peer, b"before")
        yield Bystanders(here, peer)


@pytest.fixture
def by(world_of_all: Bystanders) -> Iterator[Bystanders]:
    """After every test the connection works, and the hosts are as they were."""
    yield world_of_all
    here = world_of_all.here
    exchange(world_of_all.peer, b"after")
    assert state(here.node.process.pid) in ("S", "R")
    assert {host.name: leftovers(host) for host in (here.lab.origin, here.lab.destination)} == world_of_all.before


@pytest.mark.parametrize(("what", "words"), [
    ("file", "not a socket but /etc/hostname"), ("pipe", "not a socket but pipe:"), ("unix", "is a unix socket"),
    ("udp", "is a UDP socket"), ("fresh", "is in state UNCONN"), ("packet", "address family 17"),
    ("listener", "is a listening socket"), ("loopback", "is a loopback connection")])
def test_a_descriptor_that_is_no_connection_to_another_host(by: Bystanders, what: str, words: str) -> None:
    by.refuses(by.pass_argv(pid=by.zoo.pid, fd=by.descriptors[what]), REFUSED, words, "the origin has the connection")


def test_an_mptcp_socket(by: Bystanders, capability) -> None:  # type: ignore[no-untyped-def]
    capability("MPTCP", by.descriptors["mptcp"] >= 0)
    by.refuses(by.pass_argv(pid=by.zoo.pid, fd=by.descriptors["mptcp"]), REFUSED, "is an MPTCP socket")


def test_no_such_process_and_no_such_descriptor(by: Bystanders) -> None:
    by.refuses(by.pass_argv(pid=1 << 22, fd=3), REFUSED, f"there is no process {1 << 22}")
    by.refuses(by.pass_argv(pid=-1, fd=3), USAGE, "'-1' is not a number")
    by.refuses(by.pass_argv(fd=999), REFUSED, "has no descriptor 999", "criu-tcpcp list --pid")
    by.refuses(by.pass_argv(fd=-1), USAGE, "'-1' is not a number")


def test_a_connection_that_two_processes_share(by: Bystanders) -> None:
    by.here.lab.origin.run(["true"])
    number = by.here.descriptor()
    pidfd = os.pidfd_open(by.here.node.process.pid)
    script = f"""if True:
        import ctypes, time
        held = ctypes.CDLL(None).syscall(438, {pidfd}, {number}, 0)
        print(held, flush=True)
        time.sleep(1000)
    """
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
                          pass_fds=[pidfd]) as other:
        try:
            assert other.stdout is not None
            assert int(other.stdout.readline()) >= 0
            by.refuses(by.pass_argv(), REFUSED, f"is shared with process {other.pid}")
        finally:
            other.kill()
            os.close(pidfd)


def test_a_process_that_exits_meanwhile() -> None:
    with conversation(register=False) as (here, _peer):
        attempt = Attempt(here, "origin:stop")
        here.node.end()
        attempt.go_on()
        out, err = attempt.command.communicate(timeout=60)
        assert "has exited" in out
        assert err == ""
        assert attempt.command.returncode == REFUSED
        assert here.release() == []


@pytest.mark.parametrize(("options", "words"), [
    (["--host", "root@10.77.2.99"], ["No route to host"]),
    (["--host", "root@no.such.host.invalid"], ["no such host"]),
    (["--host", "root@10.77.2.12:2223"], ["connection refused", "is sshd running there"])])
def test_a_host_that_is_not_reached(by: Bystanders, options: list[str], words: list[str]) -> None:
    identity = by.here.lab.ssh_options(by.here.lab.destination)[:4]
    by.refuses(by.pass_argv(ssh=[*identity, *options]), REFUSED, *words, "the origin process still has its connection")


def test_an_unknown_host_key_comes_with_the_line_to_add(by: Bystanders, tmp_path: Path) -> None:
    ssh = by.here.lab.ssh_options(by.here.lab.destination)
    known = tmp_path / "known_hosts"
    known.touch()
    line = by.refuses(by.pass_argv(ssh=[*ssh, "--known-hosts", str(known)]), REFUSED, f"add this line to {known}: ")
    known.write_text(line.partition(f"to {known}: ")[2].partition(";")[0] + "\n")
    by.here.lab.origin.run([COMMAND, *by.pass_argv(ssh=[*ssh, "--known-hosts", str(known)]), "--dry-run"])


def test_a_destination_without_the_tool_or_with_another_one(by: Bystanders) -> None:
    by.refuses([*by.pass_argv(), "--remote-command", "/no/criu-tcpcp"], REFUSED,
               "`/no/criu-tcpcp` was not found on root@10.77.2.12", "pip install criu-tcpcp")
    by.refuses([*by.pass_argv(), "--remote-command", "echo hello; sleep 1; true"], REFUSED, "not criu-tcpcp")
    by.refuses([*by.pass_argv(), "--remote-command", "false"], REFUSED, "ended at once with status 1")


def test_another_version_at_the_destination_is_named_with_ours(by: Bystanders) -> None:
    other = (f"{sys.executable} -c 'from criu_tcpcp import serve; serve.__version__ = \"9.9\"; "
             "serve.messages.PROTOCOL = 99; serve.serve()' #")
    by.refuses([*by.pass_argv(), "--remote-command", other], REFUSED, f"this is criu-tcpcp {__version__} (protocol ",
               "the destination has 9.9 (protocol 99)", "install the same version at both ends")


def test_what_the_destination_refuses(by: Bystanders) -> None:
    by.refuses([*by.pass_argv(), "--into", "receiver:/no/receiver"], REFUSED, "no receiver listens at /no/receiver")
    by.refuses(by.pass_argv(ssh=by.here.lab.ssh_options(by.here.lab.origin)), REFUSED, "is the origin host itself")


def test_a_destination_without_a_route_to_the_peer(by: Bystanders) -> None:
    destination = by.here.lab.destination
    routes = [line for line in destination.run(["ip", "route"]).stdout.splitlines() if line.startswith("default")]
    destination.run(["ip", "route", "del", "default"])
    try:
        by.refuses([*by.pass_argv(), "--redirect", "forward"], REFUSED,
                   "the destination has no route to the peer 10.77.1.2")
    finally:
        destination.run(["ip", "route", "add", *routes[0].split()])


def test_a_redirect_that_cannot_be(by: Bystanders) -> None:
    by.refuses([*by.pass_argv(), "--redirect", "none"], REFUSED, "10.77.2.11 is not an address of the destination")
    by.refuses([*by.pass_argv(), "--via", "10.77.1.2", "--redirect", "forward"], REFUSED,
               "not an address of the destination itself", "--via")
    by.refuses([*by.pass_argv(), "--via", "10.77.2.11", "--redirect", "forward"], REFUSED, "which is this host itself",
               "--via")


@pytest.mark.parametrize("argv", [
    [], ["fly"], ["pass"], ["pass", "--pid", "x", "--fd", "1", "--host", "h"],
    ["pass", "--pid", "1", "--fd", "1", "--host", ""], ["pass", "--pid", "1", "--fd", "1", "--host", "h:x"],
    ["check", "--feature", "flight"], ["check", "--host", ""], ["list", "--pi", "1"], ["list", "--pid", "9" * 4000],
    ["pass", "--pid", "1", "--fd", "1", "--host", "a" * 70000],
    ["pass", "--pid", "1", "--fd", "1", "--host", "h", "--timeout", "inf"]], ids=lambda argv: " ".join(argv)[:40])
def test_usage(by: Bystanders, argv: list[str]) -> None:
    by.refuses(argv, USAGE)


@pytest.mark.parametrize("options", [["--when", "tuesday"], ["--when", "idle:"], ["--max-stall", "0"],
                                     ["--app-state", "/no/file"], ["--prologue", "/no/file"],
                                     ["--prologue", "/dev/zero"], ["--prologue", "-", "--app-state", "-"],
                                     ["--prologue", "/dev/null", "--into", "pid:1:1"],
                                     ["--prologue", "/dev/null", "--into", "receiver"],
                                     ["--redirect", "pigeon"], ["--into", "teapot"],
                                     ["--into", "receiver:"], ["--into", "auto:x"], ["--into", ""],
                                     ["--via", "banana"], ["--via", ""]], ids=" ".join)
def test_usage_of_pass(by: Bystanders, options: list[str]) -> None:
    """It does not take a destination to see that."""
    unreachable = ["--host", "no.such.host.invalid"]
    by.refuses([*by.pass_argv(ssh=unreachable), *options], USAGE)
    by.refuses([*by.pass_argv(ssh=unreachable), *options, "--dry-run"], USAGE)


@pytest.mark.parametrize("argv", [
    ["pass"], ["pass", "--pid", "1", "--fd", "1"], ["pass", "--pid", "1", "--fd", "1", "--host", "h"],
    ["pass", "--pid", "1", "--fd", "1", "--host", "h", "--into", "teapot"],
    ["pass", "--pid", "1", "--fd", "1", "--host", "h", "--dry-run"], ["pass", "--dry-run", "--fd", "x"],
    ["list", "--pid", str(1 << 22)], ["list", "--colour"], ["check", "--feature", "flight"],
    ["check", "--host", "no.such.host.invalid"], ["passes", "--all"], ["resolve", "x"],
    ["resolve", "0123456789abcdef"], ["resolve", "--force-origin"], ["resolve", "0123456789abcdef", "--force-origin"],
    ["release", "x"], ["dump", "--pid", "1", "--fd", "1"], ["dump", "--pid", "1", "--fd", "1", "-D", "/no/where/x"],
    ["show"], ["show", "-D", "/no/where"], ["show", "-D", "/proc"]], ids=" ".join)
def test_a_refusal_in_json_is_one_object(by: Bystanders, argv: list[str]) -> None:
    done = by.here.lab.origin.run([COMMAND, *argv, "--json"], check=False)
    answer = json.loads(done.stdout)
    assert (answer["schema"], answer["exit"]) == (1, done.returncode), done
    assert done.returncode in (USAGE, REFUSED)
    assert answer["error"]
    assert answer["error"].splitlines() == [answer["error"]]
    assert answer.get("owner") == ("origin" if argv[0] in ("pass", "dump") else None)
    assert done.stderr == ""


@pytest.mark.parametrize("redirected", [">/dev/full", "| true", ">&-", "2>&-", "<&-", "2>/dev/full"])
def test_where_words_cannot_go_the_status_still_tells_the_owner(by: Bystanders, redirected: str) -> None:
    argv = shlex.join([COMMAND, *by.pass_argv(fd=999), "--json"])
    done = by.here.lab.origin.run(["bash", "-c", f"{argv} {redirected}; exit ${{PIPESTATUS[0]}}"], check=False)
    assert done.returncode == REFUSED
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_passes_that_do_not_exist(by: Bystanders) -> None:
    by.refuses(["resolve", "0123456789abcdef"], REFUSED, "knows no pass 0123456789abcdef")
    by.refuses(["resolve", "../../etc"], REFUSED, "is not the id of a pass")
    by.refuses(["release", "../../etc"], REFUSED, "is not the id of a pass")
    by.refuses(["resolve", "0123456789abcdef", "--force-origin"], REFUSED, "knows no pass 0123456789abcdef")
    by.refuses(["list", "--pid", str(1 << 22)], REFUSED, "there is no process")
    for command, said in (("resolve", "no pass is in doubt\n"), ("release", "nothing to release\n"),
                          ("release 0123456789abcdef", "nothing to release\n")):
        assert by.here.lab.origin.run([COMMAND, *command.split()]).stdout == said


def test_without_privileges(by: Bystanders) -> None:
    environment = {**os.environ, **by.here.lab.origin.environment()}
    for argv in (by.pass_argv(), ["check"], ["list"], ["passes"], ["resolve"], ["release"]):
        done = subprocess.run([sys.executable, "-c", "import os, sys; os.setgroups([]); os.setgid(65534); "
                               "from criu_tcpcp.cli import main; main.parser(); os.setuid(65534); "
                               "sys.exit(main.main(sys.argv[1:]))", *argv],
                              env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (REFUSED, "")
        (line,) = done.stderr.splitlines()
        assert "root is needed" in line


def test_a_run_directory_that_cannot_be(by: Bystanders) -> None:
    by.refuses(by.pass_argv(), REFUSED, "cannot make the run directory", env={"CRIU_TCPCP_RUN_DIR": "/proc/no"})


@pytest.mark.parametrize("limit", [0, 300, 1000])
@pytest.mark.parametrize("side", ["origin", "destination"])
def test_a_full_disk(by: Bystanders, side: str, limit: int) -> None:
    """As a file size limit: a write fails in the middle (EFBIG)."""
    here = by.here
    argv = [COMMAND, *by.pass_argv(), "--app-state", __file__]
    if side == "origin":
        argv = ["prlimit", f"--fsize={limit}", *argv]
    else:
        # What can be written there is enough for the record that the pass was staged, or not even for that.
        argv += ["--remote-command", f"prlimit --fsize={min(limit, 40)} {COMMAND}"]
    done = here.lab.origin.run(argv, check=False)
    assert done.returncode in (1, REFUSED), done
    (line,) = done.stderr.splitlines()
    assert "No space left on device" in line or "File too large" in line  # cut short, or not begun
    assert "the origin process still has its connection" in line


def test_four_commands_at_once_pass_it_once() -> None:
    with conversation(register=False) as (here, peer):
        exchange(peer, b"before")
        argv = here.pass_argv()
        commands = [here.lab.origin.spawn(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                    for _ in range(4)]
        ends = [(*one.communicate(timeout=60), one.returncode) for one in commands]
        assert sorted(status for _out, _err, status in ends) in ([0, 1, 1, 1], [0, 1, 1, 3], [0, 1, 3, 3], [0, 3, 3, 3])
        assert all(err == "" for _out, err, _status in ends)
        here.owner = here.lab.destination
        exchange(peer, b"after")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.prove(passes=1)
        assert here.release() == []


def told_keeper(host: Host) -> bool:
    """A message waits in the socket between the command and the keeper."""
    rows = [line.split() for line in host.run(["ss", "-xaH"]).stdout.splitlines()]
    return any(row[0] == "u_seq" and int(row[2]) for row in rows)


def test_interrupted_from_the_keyboard_it_undoes() -> None:
    with conversation(register=False) as (here, peer):
        exchange(peer, b"before")
        attempt = Attempt(here, "origin:extract")
        attempt.command.send_signal(signal.SIGINT)
        until(lambda: told_keeper(here.owner), "the command to tell the keeper", every_s=0.02)
        attempt.go_on()
        report = attempt.outcome()
        assert report is not None
        assert (report["owner"], report["exit"]) == ("origin", 1)
        until(lambda: not attempt.find("tcpcp-keeper"), "the keeper to end", every_s=0.02)
        exchange(peer, b"after")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.prove(passes=0, loss_free=False)
        assert here.release() == []
