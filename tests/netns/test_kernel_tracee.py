"""Stopping a process: every thread, nothing visible to it or its parent, nothing lost, nothing left behind."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from criu_tcpcp.core.errors import Refused
from criu_tcpcp.kernel import process
from criu_tcpcp.kernel.tracee import Tracee
from waiting import until

pytestmark = pytest.mark.root

Start = Callable[..., subprocess.Popen[str]]

# `count(n)` counts in shared memory, which the test can see move, in the word n.
_PRELUDE = """
import ctypes, mmap, os, select, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
shared = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 4096)
def count(n):
    struct.pack_into("=Q", shared, 8 * n, struct.unpack_from("=Q", shared, 8 * n)[0] + 1)
def say(*words):
    print(*words, flush=True)
"""
COUNTS_IN_THREADS = """
def forever(n):
    while True:
        count(n)
        time.sleep(0.0005)
for n in range(4):
    threading.Thread(target=forever, args=(n,), daemon=True).start()
say("ready")
while True:  # and threads that come and go all the time
    born = [threading.Thread(target=count, args=(5 + n,)) for n in range(3)]
    [one.start() for one in born]
    count(4)
"""
SLEEPS = """
say("ready")
time.sleep(1000)
"""
COUNTS = """
say("ready")
while True:
    count(0)
    time.sleep(0.0005)
"""


class Shared:
    """The counters of a program."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(4096))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 4096)
        self.path = path

    def read(self) -> tuple[int, ...]:
        return struct.unpack_from("=8Q", self._map)


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    return Shared(tmp_path / "shared")


@pytest.fixture
def start(shared: Shared) -> Iterator[Start]:
    """Runs a program, up to its "ready"; it is killed at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def run(script: str, *arguments: str) -> subprocess.Popen[str]:
        program = subprocess.Popen([sys.executable, "-c", _PRELUDE + script, str(shared.path), *arguments], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(program)
        assert line(program) == "ready"
        return program

    yield run
    for program in started:
        end(program)


def end(program: subprocess.Popen[str]) -> None:
    """Kill it, with the threads that a failed test left traced: their ends are told to the tracer first, to us."""
    program.kill()

    def ended() -> bool:
        with contextlib.suppress(OSError):
            for tid in os.listdir(f"/proc/{program.pid}/task"):
                if int(tid) != program.pid:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(int(tid), os.WNOHANG | 0x40000000)  # __WALL
        return program.poll() is not None

    until(ended, "its end")
    for stream in (program.stdin, program.stdout):
        assert stream is not None
        stream.close()


_unread: dict[int, bytes] = {}


def line(program: subprocess.Popen[str]) -> str:
    """The next line that it says; nobody waits for ever for one that does not come."""
    assert program.stdout is not None
    while b"\n" not in _unread.setdefault(program.pid, b""):
        assert select.select([program.stdout], [], [], 10)[0], "it says nothing"
        said = os.read(program.stdout.fileno(), 4096)
        assert said, f"it has ended, after {_unread[program.pid]!r}"
        _unread[program.pid] += said
    found, _, _unread[program.pid] = _unread[program.pid].partition(b"\n")
    return found.decode()


def in_call(pid: int, *numbers: int) -> Callable[[], bool]:
    """The thread waits in one of these system calls (x86_64; 219, restart_syscall, goes on with one of them)."""
    return lambda: Path(f"/proc/{pid}/syscall").read_text().split()[0] in {str(number) for number in (219, *numbers)}


def states(pid: int) -> set[str]:
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            found.add((task / "stat").read_text().rpartition(")")[2].split()[0])
    return found


def tracers(pid: int) -> set[str]:
    return {text.partition("TracerPid:\t")[2].split()[0]
            for text in _statuses(pid)}


def _statuses(pid: int) -> Iterator[str]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            yield (task / "status").read_text()


def test_every_thread_stops_and_runs_again(start: Start, shared: Shared) -> None:
    program = start(COUNTS_IN_THREADS)
    for _ in range(20):
        tracee = Tracee(program.pid)
        tracee.stop(5)
        assert states(program.pid) == {"t"}
        before = shared.read()
        os.sched_yield()
        assert shared.read() == before
        tracee.resume()
        until(lambda: all(now > then for now, then in zip(shared.read()[:5], before[:5], strict=True)),  # noqa: B023
              "every thread goes on")
    assert tracers(program.pid) == {"0"}


def test_a_resumed_process_is_resumed_once(start: Start) -> None:
    program = start(SLEEPS)
    tracee = Tracee(program.pid)
    tracee.stop(5)
    tracee.resume()
    tracee.resume()
    assert tracers(program.pid) == {"0"}
    tracee.stop(5)
    tracee.resume()


def test_signals_that_come_while_it_is_stopped_arrive_later(start: Start) -> None:
    program = start("""
signal.signal(signal.SIGUSR1, lambda number, frame: say("usr1"))
signal.signal(signal.SIGUSR2, lambda number, frame: say("usr2"))
say("ready")
while True: signal.pause()
""")
    for pinned in (False, True):
        tracee = Tracee(program.pid)
        tracee.stop(5)
        if pinned:
            tracee.pin()
        os.kill(program.pid, signal.SIGUSR1)
        os.kill(program.pid, signal.SIGUSR2)
        tracee.resume()
        assert {line(program), line(program)} == {"usr1", "usr2"}
        assert process.run_state(program.pid) != "T"


def test_a_signal_on_its_way_is_not_lost(start: Start) -> None:
    program = start("""
got = 0
def handler(number, frame):
    global got
    got += 1
    count(0)
signal.signal(signal.SIGUSR1, handler)
say("ready")
while True: signal.pause()
""")
    for number in range(30):
        os.kill(program.pid, signal.SIGUSR1)
        tracee = Tracee(program.pid)
        tracee.stop(5)
        if number % 2:
            tracee.pin()
        tracee.resume()
        until(in_call(program.pid, 34), "pause")
    assert program.poll() is None


def test_a_stopped_process_can_be_killed(start: Start) -> None:
    program = start(COUNTS_IN_THREADS)
    tracee = Tracee(program.pid)
    tracee.stop(5)
    tracee.pin()
    program.kill()
    tracee.resume()
    until(lambda: program.poll() is not None, "it can be collected: no thread is kept by its tracer", 5)
    assert program.returncode == -signal.SIGKILL


WAITS = {
    "epoll_wait": ((232, 281), """
epoll, (there, here) = select.epoll(), socket.socketpair()
epoll.register(here, select.EPOLLIN)
events = (ctypes.c_char * 64)()
result = libc.epoll_wait(epoll.fileno(), events, 4, -1)
"""),
    "epoll_wait with a time-out": ((232, 281), """
epoll, (there, here) = select.epoll(), socket.socketpair()
epoll.register(here, select.EPOLLIN)
events = (ctypes.c_char * 64)()
result = libc.epoll_wait(epoll.fileno(), events, 4, 60000)
"""),
    "poll": ((7,), """
there, here = socket.socketpair()
result = libc.poll(struct.pack("=ihh", here.fileno(), 1, 0), 1, 60000)
"""),
    "recv": ((45,), """
there, here = socket.socketpair()
result = libc.recv(here.fileno(), ctypes.create_string_buffer(10), 10, 0)
"""),
    "read": ((0,), """
there, here = socket.socketpair()
result = libc.read(here.fileno(), ctypes.create_string_buffer(10), 10)
"""),
    "accept": ((43, 288), """
listener = socket.create_server(("127.0.0.1", 0))
class Caller:
    def send(self, data):
        self.socket = socket.create_connection(listener.getsockname())
there = Caller()
result = 1 if libc.accept(listener.fileno(), None, None) >= 0 else -1
"""),
}


@pytest.mark.parametrize("pinned", [False, True], ids=["", "pinned"])
@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_not_visibly_interrupted(name: str, pinned: bool, start: Start) -> None:
    numbers, wait = WAITS[name]
    program = start(f"""
def wait():
    global there, here, listener
{textwrap.indent(wait, "    ")}
    say("returned", result, ctypes.get_errno() if result < 0 else 0)
def thread():
    say(threading.get_native_id())
    wait()
say("ready")
waiting = threading.Thread(target=thread)
waiting.start()
sys.stdin.readline()
there.send(b"x")
waiting.join()
""")
    tid = int(line(program))
    stands = in_call(tid, *numbers)
    for _ in range(3):
        until(stands, name)
        tracee = Tracee(program.pid)
        tracee.stop(5)
        if pinned:
            tracee.pin()
        tracee.resume()
    until(stands, f"{name} again")
    assert program.stdin is not None
    program.stdin.write("go\n")
    program.stdin.flush()
    assert line(program) == "returned 1 0"


def test_a_sleep_lasts_as_long_as_it_should(start: Start) -> None:
    program = start("""
say("ready")
begin = time.monotonic()
result = libc.nanosleep(struct.pack("=qq", 0, 600_000_000), None)
say(result, 0.6 <= time.monotonic() - begin < 5)
""")
    for pinned in (False, True):
        until(in_call(program.pid, 35, 230), "nanosleep")
        tracee = Tracee(program.pid)
        tracee.stop(5)
        if pinned:
            tracee.pin()
        tracee.resume()
    assert line(program) == "0 True"


def test_a_handler_still_ends_a_wait(start: Start) -> None:
    """That epoll_wait is started again must not swallow the EINTR of a real signal."""
    program = start("""
signal.signal(signal.SIGUSR1, lambda number, frame: None)
epoll = select.epoll()
events = (ctypes.c_char * 64)()
say("ready")
result = libc.epoll_wait(epoll.fileno(), events, 4, 60000)
say(result, ctypes.get_errno())
""")
    until(in_call(program.pid, 232, 281), "epoll_wait")
    tracee = Tracee(program.pid)
    tracee.stop(5)
    os.kill(program.pid, signal.SIGUSR1)
    tracee.resume()
    assert line(program) == "-1 4"


TRACER = """if True:
    import sys
    from criu_tcpcp.kernel.tracee import Tracee
    tracee = Tracee(int(sys.argv[1]))
    tracee.stop(5)
    if sys.argv[2] == "pin":
        tracee.pin()
    print("stopped", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def tracer() -> Iterator[Callable[[int, str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def run(pid: int, what: str) -> subprocess.Popen[str]:
        program = subprocess.Popen([sys.executable, "-c", TRACER, str(pid), what], text=True, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE)
        started.append(program)
        assert line(program) == "stopped"
        return program

    yield run
    for program in started:
        end(program)


def test_when_the_tracer_is_killed_the_process_runs(start: Start, shared: Shared, tracer: Callable[..., Any]) -> None:
    program = start(COUNTS_IN_THREADS)
    other = tracer(program.pid, "no")
    assert states(program.pid) == {"t"}
    before = shared.read()
    other.kill()
    until(lambda: all(now > then for now, then in zip(shared.read()[:5], before[:5], strict=True)), "it runs")


@pytest.mark.parametrize("script", [COUNTS_IN_THREADS, SLEEPS], ids=["threads", "sleeps"])
def test_when_the_tracer_is_killed_a_pinned_process_stays_stopped(
        script: str, start: Start, shared: Shared, tracer: Callable[..., Any]) -> None:
    program = start(script)
    other = tracer(program.pid, "pin")
    other.kill()
    until(lambda: states(program.pid) == {"T"}, "state T")
    before = shared.read()
    os.sched_yield()
    assert shared.read() == before
    # The next one takes over from there, and a program that is continued runs.
    second = Tracee(program.pid)
    second.stop(5)
    second.pin()
    second.resume()
    os.kill(program.pid, signal.SIGCONT)
    until(lambda: "T" not in states(program.pid), "it runs")


def test_its_parent_hears_nothing(start: Start) -> None:
    parent = start("""
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
child = os.fork()
if not child:
    while True:
        count(0)
        time.sleep(0.0005)
say("ready")
say(child)
while True:
    told = signal.sigwaitinfo([signal.SIGCHLD])
    say(told.si_code)
    if told.si_code == 2: break  # CLD_KILLED
""")
    child = int(line(parent))
    for pinned in (False, True) * 3:
        tracee = Tracee(child)
        tracee.stop(5)
        if pinned:
            tracee.pin()
        tracee.resume()
    os.kill(child, signal.SIGKILL)
    assert line(parent) == "2", "CLD_STOPPED is 5, CLD_CONTINUED 6, CLD_TRAPPED 4"


def test_a_process_that_somebody_traces_is_refused(start: Start, tracer: Callable[..., Any]) -> None:
    program = start(SLEEPS)
    other = tracer(program.pid, "no")
    with pytest.raises(Refused, match=f"traced by process {other.pid}"):
        Tracee(program.pid).stop(1)
    assert tracers(program.pid) == {str(other.pid)}


def test_a_process_that_has_exited_is_refused(start: Start) -> None:
    program = start("say('ready')")
    until(lambda: process.run_state(program.pid) == "Z", "a zombie")
    with pytest.raises(Refused, match="exited"):
        Tracee(program.pid).stop(1)
    program.wait()
    with pytest.raises(Refused, match="exited"):
        Tracee(program.pid).stop(1)


def test_a_process_that_waits_is_quiet_and_one_that_computes_is_not(start: Start) -> None:
    quiet = start("""
pairs = [socket.socketpair() for _ in range(4)]
def wait(n): pairs[n][0].recv(1)
[threading.Thread(target=wait, args=(n,)).start() for n in range(4)]
say("ready")
select.epoll().poll()
""")
    for task in os.listdir(f"/proc/{quiet.pid}/task"):
        until(in_call(int(task), 232, 281, 45), "all wait")
    busy = start("""
def spin():
    while True: count(0)
threading.Thread(target=spin, daemon=True).start()
say("ready")
select.epoll().poll()
""")
    for program, is_quiet in ((quiet, True), (busy, False)):
        tracee = Tracee(program.pid)
        tracee.stop(5)
        found = tracee.busy_thread()
        tracee.resume()
        assert (found is None) == is_quiet, found


def test_a_stop_that_takes_too_long_leaves_the_process_running(start: Start, tmp_path: Path) -> None:
    """A thread in an uninterruptible sleep: vfork waits for a child that waits for a FIFO. ptrace lets go of it only
    where it stops, or with its tracer: when that has ended, the thread runs on, then and later."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    program = start("""
def stuck():
    say(threading.get_native_id())
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, sys.argv[2], 0, 0)]), 0)
    say("spawned")
say("ready")
threading.Thread(target=stuck).start()
""", str(fifo))
    tid = int(line(program))
    until(lambda: process.run_state(tid) == "D", "vfork")
    tracer = os.fork()
    if not tracer:
        status = 1
        try:
            Tracee(program.pid).stop(0.05)
        except Refused as refused:
            status = 0 if "in time" in str(refused) else 2
        finally:
            os._exit(status)
    assert os.waitpid(tracer, 0)[1] == 0
    writer = os.open(fifo, os.O_WRONLY)
    os.close(writer)
    until(lambda: process.run_state(tid) != "D", "vfork ends", 3)
    until(lambda: "t" not in states(program.pid), "no thread is left in a stop", 3)
    assert line(program) == "spawned"
    assert tracers(program.pid) == {"0"}
