"""The lab itself: that its hosts are hosts, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from criu_tcpcp.core.errors import KernelError
from criu_tcpcp.kernel import netns
from criu_tcpcp.lab import Host, Lab, leftovers, network, record
from criu_tcpcp.lab.sshd import DOOR_PORT, DOOR_USER

pytestmark = pytest.mark.root

SLEEP = "import time; time.sleep(1000)"
IGNORES_SIGTERM = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); {SLEEP}"
DAEMON = f"import os; os.fork() and os._exit(0); os.setsid(); print(os.getpid(), flush=True); {SLEEP}"


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.005)


def lives(pid: int) -> bool:
    return record.start_time(pid) is not None


def traces(namespace: Path) -> list[Path]:
    """What is left of the lab that `namespace` (of its peer) belongs to."""
    lab_id = namespace.name.split("-")[1]
    places = [(network.NETNS_DIRECTORY, f"tcpcp-{lab_id}-*"), (Path("/tmp"), f"tcpcp-{lab_id}*"),
              (Path("/dev/shm"), f"tcpcp-{lab_id}*"), (Path("/run/criu-tcpcp-lab"), f"*{lab_id}*")]
    return [path for directory, pattern in places for path in directory.glob(pattern)]


def converse(asking: Host, answering: Host, version: int) -> tuple[str, ...]:
    """One TCP connection between two hosts; returns the addresses that the answering one saw: its own, the other's."""
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    address = str(answering.address(version))
    with answering.enter():
        listener = socket.create_server((address, 7000), family=family)
    with listener:
        listener.settimeout(5)
        with asking.enter():
            connection = socket.create_connection((address, 7000), timeout=5)
        accepted, _ = listener.accept()
        with connection, accepted:
            accepted.settimeout(5)
            connection.sendall(b"hello")
            assert accepted.recv(5, socket.MSG_WAITALL) == b"hello"
            return accepted.getsockname()[0], accepted.getpeername()[0]


@pytest.mark.parametrize("version", [4, 6])
def test_hosts_reach_each_other(lab: Lab, version: int) -> None:
    for asking, answering in itertools.permutations([lab.peer, lab.origin, lab.destination, lab.gateway], 2):
        own, other = converse(asking, answering, version)
        assert own == str(answering.address(version))
        if lab.gateway is not asking:      # it has an address towards each side
            assert other == str(asking.address(version))


def test_packets_are_kept_in_order_by_one_cpu_on_every_interface(lab: Lab) -> None:
    lab.keep_order()
    for host in lab.hosts.values():
        said = host.run(["ip", "netns", "exec", host.netns.name, "sh", "-c",
                         "cat /sys/class/net/*/queues/rx-*/rps_cpus"]).stdout.split()
        assert said
        assert {int(mask.replace(",", ""), 16) for mask in said} == {1}


def test_more_hosts_can_be_asked_for() -> None:
    with Lab(["third"]) as lab:
        assert converse(lab.peer, lab.hosts["third"], 6)
        assert converse(lab.origin, lab.hosts["third"], 4)


def test_two_labs_at_once_do_not_meet(lab: Lab) -> None:
    with Lab() as other:
        with lab.origin.enter():
            listener = socket.create_server((str(lab.origin.ipv4), 7000))
        with listener:
            assert converse(other.peer, other.origin, 4)      # the same address and port, another host
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
        assert not {host.netns for host in lab.hosts.values()} & {host.netns for host in other.hosts.values()}
        kept = other.peer.netns
    assert traces(kept) == []
    assert converse(lab.peer, lab.origin, 4)


def test_the_machine_sees_no_interface_of_the_lab() -> None:
    before = subprocess.check_output(["ip", "-o", "address"], text=True)
    with Lab():
        addresses = subprocess.check_output(["ip", "-o", "address"], text=True)
        assert "10.77." not in addresses.replace(before, "")
        assert {line.split()[1] for line in addresses.splitlines()} <= {line.split()[1] for line in before.splitlines()}


def test_a_program_runs_on_its_host(lab: Lab) -> None:
    program = "echo $CRIU_TCPCP_RUN_DIR; ip -o -4 address show dev eth0; cat"
    done = lab.destination.run(["sh", "-c", program], input="in")
    assert done.stdout.splitlines()[0] == str(lab.destination.run_dir)
    assert f" {lab.destination.ipv4}/" in done.stdout
    assert done.stdout.endswith("in")
    assert lab.destination.run_dir.stat().st_mode & 0o777 == 0o755
    with pytest.raises(subprocess.CalledProcessError) as raised:
        lab.peer.run(["sh", "-c", "echo no >&2; exit 4"])
    assert raised.value.returncode == 4
    assert "stderr: no" in raised.value.__notes__[0]
    with pytest.raises(subprocess.TimeoutExpired):
        lab.peer.run(["sleep", "1000"], timeout=0.05)
    assert lab.peer.processes == []


@pytest.mark.parametrize("version", [4, 6])
def test_ssh_login(lab: Lab, version: int) -> None:
    options = lab.ssh_options(lab.destination, version)
    assert options[:4] == ["-i", str(lab.ssh.key), "--known-hosts", str(lab.ssh.known_hosts)]
    user, _, address = options[5].partition("@")
    assert (user, address.strip("[]")) == ("root", str(lab.destination.address(version)))
    command = 'echo "$CRIU_TCPCP_RUN_DIR"; command -v python; ip -o address show dev eth0; ls -d /run/netns; exit 5'
    done = lab.origin.run(["ssh", "-F", lab.ssh.config, f"root@{address.strip('[]')}", command], check=False)
    assert done.returncode == 5, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(lab.destination.run_dir)
    assert lines[1] == os.path.join(os.path.dirname(sys.executable), "python")
    assert f" {lab.destination.ipv4}/" in done.stdout
    assert lines[-1] == "/run/netns"      # the file system of the lab's maker, not sshd's
    assert done.stderr == ""


def test_ssh_by_name_both_ways_and_as_a_byte_stream(lab: Lab) -> None:
    lab.origin.start_sshd()
    lab.destination.start_sshd()
    lab.destination.start_sshd()      # once more does nothing
    for here, there in ((lab.origin, lab.destination), (lab.destination, lab.origin)):
        text = "".join(chr(code) for code in range(1, 128)) * 1000
        process = here.spawn(["ssh", "-F", lab.ssh.config, there.name, "cat"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
        assert process.communicate(text.encode(), timeout=20)[0] == text.encode()


def test_sshd_starts_again_with_the_same_key(lab: Lab) -> None:
    lab.destination.start_sshd()
    server = lab.destination.processes[-1]
    server.kill()
    server.wait()
    known = lab.ssh.known_hosts.read_text()
    lab.destination.start_sshd()
    assert lab.ssh.known_hosts.read_text() == known
    assert lab.origin.run(["ssh", "-F", lab.ssh.config, "destination", "echo there"]).stdout == "there\n"


def test_sshd_that_cannot_start_says_why(lab: Lab) -> None:
    with lab.origin.enter(), contextlib.ExitStack() as taken:
        for port in (22, DOOR_PORT):
            taken.enter_context(socket.create_server(("0.0.0.0", port)))
            taken.enter_context(socket.create_server(("::", port), family=socket.AF_INET6))
        with pytest.raises(RuntimeError, match="Address already in use"):
            lab.origin.start_sshd()


def test_a_forced_command_is_all_that_its_key_can_do(lab: Lab) -> None:
    lab.destination.start_sshd()
    key = lab.ssh.force(lab.destination, DOOR_USER, 'restrict,command="id -un; echo $SSH_ORIGINAL_COMMAND"')
    ssh = ["ssh", "-p", str(DOOR_PORT), "-o", f"UserKnownHostsFile={lab.ssh.known_hosts}", "-o", "BatchMode=yes", "-i"]
    done = lab.origin.run([*ssh, key, f"{DOOR_USER}@{lab.destination.ipv4}", "cat /etc/shadow"])
    assert done.stdout == f"{DOOR_USER}\ncat /etc/shadow\n"
    for user, other in (("root", key), ("root", lab.ssh.key), (DOOR_USER, lab.ssh.key)):
        done = lab.origin.run([*ssh, other, f"{user}@{lab.destination.ipv4}"], check=False)
        assert "Permission denied" in done.stderr


def test_teardown_leaves_nothing(lab: Lab) -> None:
    with Lab() as doomed:
        stubborn = doomed.origin.spawn([sys.executable, "-c", IGNORES_SIGTERM], stdout=subprocess.PIPE, text=True)
        daemon = _daemon(doomed.peer)
        contained = doomed.destination.spawn(["unshare", "--net", "sleep", "1000"])
        stopped = doomed.gateway.spawn(["sleep", "1000"])
        stopped.send_signal(signal.SIGSTOP)
        doomed.origin.start_sshd()
        assert stubborn.stdout is not None
        assert stubborn.stdout.readline() == "ready\n"
        own = netns.identity(doomed.destination.netns)
        wait_until(lambda: netns.identity(f"/proc/{contained.pid}/ns/net") != own, "unshare")
        stubborn.terminate()
        pids = [stubborn.pid, daemon, contained.pid, stopped.pid]
        assert all(map(lives, pids))
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert not any(map(lives, pids))
    assert traces(doomed.peer.netns) == []
    assert converse(lab.peer, lab.origin, 4)      # the other lab is as it was


def _daemon(host: Host) -> int:
    process = host.spawn([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_a_lab_that_cannot_be_built_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_host_commands", lambda place: iter(["link set nothing up"]))
    lab = Lab()
    with pytest.raises(RuntimeError, match="link set nothing up"):
        lab.__enter__()
    assert traces(lab.peer.netns) == []


@pytest.fixture
def creator() -> Iterator[tuple[subprocess.Popen[str], Path, int]]:
    """A process that made a lab, the namespace of its peer, and the pid of something that runs in the lab."""
    # Whoever runs the tests in the background may have it ignore some signals, and a child inherits that.
    program = ("import signal, sys\nfrom criu_tcpcp.lab import Lab\n"
               "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
               "signal.signal(signal.SIGINT, signal.default_int_handler)\nwith Lab() as lab:\n"
               "    print(lab.peer.netns, lab.peer.spawn(['sleep', '1000']).pid, flush=True)\n"
               "    lab.peer.processes[0].wait()\n")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        namespace, pid = process.stdout.readline().split()
        yield process, Path(namespace), int(pid)
        process.kill()


def test_sweep_removes_the_lab_of_a_killed_creator(creator: tuple[subprocess.Popen[str], Path, int]) -> None:
    process, namespace, pid = creator
    Lab.sweep()
    assert lives(pid)      # its creator lives
    process.kill()
    process.wait()
    Lab.sweep()
    assert not lives(pid)
    wait_until(lambda: traces(namespace) == [], "sweep, if another test's lab was faster")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_tears_the_lab_down(creator: tuple[subprocess.Popen[str], Path, int], number: signal.Signals) -> None:
    process, namespace, pid = creator
    process.send_signal(number)
    assert process.wait(10) == -number
    assert not lives(pid)
    assert traces(namespace) == []


def test_a_fork_does_not_tear_the_lab_down() -> None:
    with Lab() as lab:
        child = os.fork()
        if child == 0:
            lab.__exit__(None, None, None)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert converse(lab.peer, lab.origin, 4)


def test_join(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record, "_RECORDS", tmp_path / "records")      # so that no other lab is found
    with pytest.raises(LookupError, match="0 labs"):
        Lab.join()
    with Lab(["third"], joinable=True) as lab, Lab():
        joined = Lab.join()
        assert {name: host.netns for name, host in joined.hosts.items()} == \
            {name: host.netns for name, host in lab.hosts.items()}
        options = lab.ssh_options(lab.origin)
        assert joined.ssh_options(joined.origin) == options      # the server that runs already
        assert joined.origin.processes == []
        joined.tear_down()      # is not its to do
        assert converse(joined.peer, joined.origin, 4)
    assert not (tmp_path / "records").exists()


def test_the_command_runs_something_on_a_host() -> None:
    done = subprocess.run([sys.executable, "-m", "criu_tcpcp.lab", "exec", "destination", "--", "sh", "-c",
                           "echo $CRIU_TCPCP_RUN_DIR; exit 5"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 5, done.stderr
    assert done.stdout.endswith("/destination\n")


CHANGES = {
    "nft": ("nft add table inet left", "nft delete table inet left"),
    "rule4": ("ip -4 rule add fwmark 7 table 77", "ip -4 rule del fwmark 7 table 77"),
    "rule6": ("ip -6 rule add fwmark 7 table 77", "ip -6 rule del fwmark 7 table 77"),
    "route4": ("ip route add 192.0.2.0/24 via 10.77.2.12 table 77", "ip route flush table 77"),
    "route6": ("ip -6 route add 2001:db8::/64 via fd00:77:2::12 table 77", "ip -6 route flush table 77"),
    "link": ("ip link add left type veth peer name right", "ip link del left"),
    "address": ("ip address add 192.0.2.1/32 dev eth0", "ip address del 192.0.2.1/32 dev eth0"),
    "neighbour": ("ip neighbour add 10.77.2.99 lladdr 2:0:0:0:0:1 dev eth0", "ip neighbour del 10.77.2.99 dev eth0"),
    "proxy4": ("ip neighbour add proxy 192.0.2.1 dev eth0", "ip neighbour del proxy 192.0.2.1 dev eth0"),
    "qdisc": ("tc qdisc add dev eth0 clsact", "tc qdisc del dev eth0 clsact"),
    "sysctl": ("echo 1 > /proc/sys/net/ipv4/conf/all/proxy_arp", "echo 0 > /proc/sys/net/ipv4/conf/all/proxy_arp"),
    "file": ("touch $CRIU_TCPCP_RUN_DIR/left", "rm $CRIU_TCPCP_RUN_DIR/left"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_leftovers_sees_a_change_and_its_end(lab: Lab, kind: str) -> None:
    do, undo = CHANGES[kind]
    before = leftovers(lab.origin)
    lab.origin.run(["sh", "-c", do])
    after = leftovers(lab.origin)
    assert any(line.startswith(f"{kind} ") for line in set(after) - set(before)), after
    assert set(before) <= set(after) or kind == "sysctl"
    lab.origin.run(["sh", "-c", undo])
    assert leftovers(lab.origin) == before


def test_leftovers_names_a_stopped_process(lab: Lab) -> None:
    before = leftovers(lab.origin)
    process = lab.origin.spawn(["sleep", "1000"])
    assert leftovers(lab.origin) == before
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: f"process {process.pid} is in state T" in leftovers(lab.origin), "stop")


def test_leftovers_are_blind_to_traffic_and_counters(lab: Lab) -> None:
    lab.origin.run(["nft", "-f", "-"], input="""
        table inet t {
            set s { type ipv4_addr; flags timeout; elements = { 192.0.2.1 timeout 1h }; }
            counter c { }
            chain input { type filter hook input priority 0; counter; tcp dport 7000 counter name "c"; }
            chain other { type filter hook output priority 0; counter accept; }
        }""")
    before = leftovers(lab.origin)
    assert "nft > table inet t > chain other > counter accept" in before
    for version in (4, 6):
        converse(lab.peer, lab.origin, version)
    assert leftovers(lab.origin) == before


def test_enter_returns_and_identity_tells_namespaces_apart(lab: Lab) -> None:
    outside = netns.identity("/proc/thread-self/ns/net")
    inner = netns.identity(lab.peer.netns)
    assert inner != outside
    descriptor = os.open(lab.peer.netns, os.O_RDONLY)
    try:
        for namespace in (lab.peer.netns, str(lab.peer.netns), descriptor):
            with pytest.raises(LookupError, match="inside"), netns.enter(namespace):
                raise LookupError("inside" if netns.identity("/proc/thread-self/ns/net") == inner else "outside")
            assert netns.identity("/proc/thread-self/ns/net") == outside
    finally:
        os.close(descriptor)


def test_enter_and_identity_fail_with_the_kernels_number() -> None:
    with pytest.raises(KernelError, match="open: /run/netns/none") as raised, netns.enter("/run/netns/none"):
        pass
    assert raised.value.errno == errno.ENOENT
    with pytest.raises(KernelError, match="setns") as raised, netns.enter("/proc/self/ns/uts"):
        pass
    assert raised.value.errno == errno.EINVAL
    with pytest.raises(KernelError, match="stat"):
        netns.identity("/run/netns/none")


def test_one_processor_takes_all_packets_where_order_is_kept() -> None:
    show = "cat /sys/class/net/*/queues/rx-*/rps_cpus"
    with Lab() as lab:
        lab.keep_order()
        for host in lab.hosts.values():
            masks = subprocess.check_output(["ip", "netns", "exec", host.netns.name, "sh", "-c", show], text=True)
            assert {int(mask.replace(",", ""), 16) for mask in masks.split()} == {1}
