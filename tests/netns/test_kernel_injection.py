"""A system call made in another program: the program cannot tell, whatever it waits in, and whenever this tool dies."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from criu_tcpcp.core.errors import KernelError, Refused
from criu_tcpcp.graft import in_place, replacing
from criu_tcpcp.kernel import injection, process, tracee
from criu_tcpcp.kernel.tracee import Tracee
from waiting import until

pytestmark = pytest.mark.root

SOURCE = Path(__file__).parents[1] / "inside.c"
#: How it waits -> the system call (x86_64), what ends the wait, and how it then ends: its result, and the signals seen.
WAYS: dict[str, tuple[int, str, str]] = {
    "read": (0, "write", "1 0"), "poll": (7, "write", "1 0"), "ppoll": (271, "write", "1 0"),
    "epoll_wait": (232, "write", "1 0"), "futex": (202, "usr1", "-4 10"), "nanosleep": (35, "time", "0 0"),
    "sigsuspend": (130, "usr1", "-4 10"), "getpid": (39, "usr1", "0 10")}
Start = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture(scope="session")
def inside(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("inside") / "inside")
    subprocess.run(["gcc", "-O1", "-Wall", "-Werror", "-o", path, SOURCE], check=True)
    return path


@pytest.fixture
def start(inside: str) -> Iterator[Start]:
    """Runs inside.c, up to its wait."""
    started: list[subprocess.Popen[bytes]] = []

    def run(way: str) -> subprocess.Popen[bytes]:
        program = subprocess.Popen([inside, way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        started.append(program)
        assert line(program) == "waiting"
        if way in WAYS and way != "getpid":
            until(lambda: call_of(program.pid) in (WAYS[way][0], 219), f"{way} to wait")
        return program

    yield run
    for program in started:
        program.kill()
        program.wait()
        for stream in (program.stdin, program.stdout):
            assert stream is not None
            stream.close()


def line(program: subprocess.Popen[bytes]) -> str:
    assert program.stdout is not None
    assert select.select([program.stdout], [], [], 20)[0], "it says nothing"
    said = program.stdout.readline()
    assert said, f"it has ended: {program.wait()}"
    return said.decode().strip()


def call_of(pid: int) -> int:
    word = Path(f"/proc/{pid}/syscall").read_text().split()[0]
    return int(word) if word.isdigit() else -1


def ends(program: subprocess.Popen[bytes], way: str) -> str:
    """End its wait; what it says."""
    if WAYS[way][1] == "usr1":
        os.kill(program.pid, signal.SIGUSR1)
    elif WAYS[way][1] == "write":
        assert program.stdin is not None
        program.stdin.write(b"x")
    return line(program)


def vdso(pid: int) -> bytes:
    begin, end = process.mapping(pid, "[vdso]")
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(begin)
        return memory.read(end - begin)


def masks(pid: int) -> list[str]:
    """Not SigQ, which counts the signals of all the user's processes."""
    return [one for one in process.status_lines(pid) if one.startswith(("Sig", "Shd")) and not one.startswith("SigQ")]


def made(pid: int, times: int = 1, patience_s: float = 5) -> list[int]:
    """The descriptors of sockets that the program made."""
    found = []
    for _ in range(times):
        stopped = injection.stop(pid, patience_s)
        try:
            with injection.new_socket(stopped, socket.AF_INET) as descriptor:
                found.append(descriptor)
        finally:
            stopped.resume()
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_program_cannot_tell(way: str, start: Start) -> None:
    program = start(way)
    before = process.descriptors(program.pid), vdso(program.pid), masks(program.pid)
    lowest = min(set(range(99)) - set(before[0]))
    assert made(program.pid, 3) == [lowest, lowest + 1, lowest + 2]
    for descriptor in range(lowest, lowest + 3):
        assert process.socket_inode(process.descriptors(program.pid)[descriptor])
        stopped = injection.stop(program.pid, 5)
        injection.close(stopped, descriptor)
        stopped.resume()
    if way not in ("ppoll", "sigsuspend"):  # these show the mask of the wait
        assert masks(program.pid) == before[2]
    assert (process.descriptors(program.pid), vdso(program.pid)) == before[:2]
    assert ends(program, way) == f"intact {WAYS[way][2]}"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2], ids=["ends", "restarts"])
def test_a_signal_that_comes_meanwhile_meets_the_wait(number: signal.Signals, start: Start) -> None:
    """One whose handler ends a read with EINTR does; behind one that restarts it, the read goes on."""
    program = start("read")
    stopped = injection.stop(program.pid, 5)
    with injection.new_socket(stopped, socket.AF_INET):
        os.kill(program.pid, number)
    stopped.resume()
    if number == signal.SIGUSR1:
        assert line(program) == "intact -4 10"
    else:
        until(lambda: call_of(program.pid) == 0, "read again")
        assert ends(program, "read") == "intact 1 12"


def test_a_stop_that_comes_meanwhile_stops_it(start: Start) -> None:
    program = start("read")
    stopped = injection.stop(program.pid, 5)
    os.kill(program.pid, signal.SIGSTOP)
    with injection.new_socket(stopped, socket.AF_INET):
        pass
    stopped.resume()
    until(lambda: process.run_state(program.pid) == "T", "state T")
    made(program.pid)  # stopped by somebody, and it stays so
    until(lambda: process.run_state(program.pid) == "T", "state T")
    os.kill(program.pid, signal.SIGCONT)
    assert ends(program, "read") == "intact 1 0"


@pytest.mark.parametrize("way", ["read", "nanosleep"])
def test_what_is_not_wanted_is_closed_again(way: str, start: Start) -> None:
    program = start(way)
    before = process.descriptors(program.pid), vdso(program.pid)
    stopped = injection.stop(program.pid, 5)
    with contextlib.suppress(ZeroDivisionError), injection.new_socket(stopped, socket.AF_INET) as descriptor:
        assert descriptor in process.descriptors(program.pid)
        raise ZeroDivisionError
    stopped.resume()
    assert (process.descriptors(program.pid), vdso(program.pid)) == before
    assert ends(program, way) == f"intact {WAYS[way][2]}"


def test_a_main_thread_that_computes_leaves_it_to_another(start: Start) -> None:
    program = subprocess.Popen([sys.executable, "-c", """if True:
        import threading, time
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        print("waiting", flush=True)
        while True: pass"""], stdout=subprocess.PIPE)
    try:
        assert line(program) == "waiting"
        thread = next(int(one) for one in os.listdir(f"/proc/{program.pid}/task") if int(one) != program.pid)
        until(lambda: call_of(thread) in (35, 230, 219), "the thread to sleep")
        descriptor, = made(program.pid)
        assert process.socket_inode(process.descriptors(program.pid)[descriptor])
        until(lambda: call_of(thread) in (35, 230, 219), "the thread to sleep on")
    finally:
        program.kill()
        program.communicate()


def make_one(stopped: Tracee) -> None:
    with injection.new_socket(stopped, socket.AF_INET):
        pass


def killed_at(point: int, pid: int, act: Callable[[Tracee], None] = make_one) -> int:
    """A child makes a socket in the program, and dies at `point`: they are before and behind each ptrace call, so when
    all has come to a stop, and when nothing has. Returns how many there were, or 0."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        calls, pokes, real = 0, 0, tracee.libc.ptrace

        def ptrace(*arguments: int) -> int:
            nonlocal calls, pokes
            pokes += arguments[0] == 5  # PTRACE_POKEDATA: one in six of these many
            if arguments[0] == 5 and pokes % 6:
                return int(real(*arguments))
            for step in (lambda: 0, lambda: real(*arguments)):
                result = int(step())
                calls += 1
                if calls == point:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result
        with contextlib.suppress(BaseException):
            stopped = injection.stop(pid, 5)  # whose calls are as those of any stop: test_kernel_tracee.py
            tracee.libc = type("Libc", (), {"ptrace": staticmethod(ptrace), "tgkill": tracee.libc.tgkill})
            act(stopped)
            stopped.resume()
            os.write(writing, b"%d" % calls)
        os._exit(0)
    os.close(writing)
    with open(reading) as told:
        points = int(told.read() or 0)
    os.waitpid(child, 0)
    return points


@pytest.mark.parametrize("way", WAYS)
def test_the_tool_is_killed_between_any_two_steps(way: str, start: Start) -> None:
    """The program does the rest by itself: it goes on in its wait, and has closed what it was made to open, unless that
    was settled. What is left of the stub is wiped by a later use, and never stands in its way."""
    program = start(way)
    before, clean = process.descriptors(program.pid), vdso(program.pid)
    points = killed_at(0, program.pid)
    assert points > 40
    kept = set(process.descriptors(program.pid)) - set(before)
    assert len(kept) == 1
    for point in range(1, points + 1):
        if killed_at(point, program.pid):
            break  # it took fewer steps this time
        until(lambda: process.run_state(program.pid) in "SR", f"it to run after point {point}")
        if WAYS[way][0] != 39:
            until(lambda: call_of(program.pid) in (WAYS[way][0], 219, 0), f"{way} to go on after point {point}")
    more = set(process.descriptors(program.pid)) - set(before) - kept
    assert len(more) < points / 2, "those that were settled"
    said = ends(program, way)
    # Whoever traces epoll_wait and is killed ends it with EINTR (fs/eventpoll.c, ep_poll), injection or not.
    assert said == f"intact {WAYS[way][2]}" or (way, said) == ("epoll_wait", "intact -4 0")
    if way != "getpid":
        for _ in range(20):
            made(program.pid)
        assert vdso(program.pid)[:len(clean.rstrip(b"\0"))] == clean.rstrip(b"\0")


def replacing_killed_at(point: int, pid: int, place: replacing.Place, number: int) -> bool:
    """As `killed_at`, while a descriptor is replaced; False where it was not killed."""
    def put(stopped: Tracee) -> None:
        with in_place.borrow(pid, number) as sock:
            replacing.put(stopped, place, number, sock)
    return not killed_at(point, pid, put)


def test_replacing_a_descriptor_is_continued_wherever_it_was_killed(start: Start) -> None:
    """Standard input, a pipe that epoll watches with data of its own, becomes the socket that the program made."""
    for point in itertools.count(3, 9):
        program = start("epoll_wait")
        before = process.descriptors(program.pid)
        place = replacing.place_of(program.pid, 0)
        (epoll, events, data), = place.watches
        assert (data, events & select.EPOLLIN) == (42, select.EPOLLIN)
        number, = made(program.pid)
        link = process.descriptors(program.pid)[number]
        was_killed = replacing_killed_at(point, program.pid, place, number)
        if was_killed:
            stopped = injection.stop(program.pid, 5)  # until then, the stub goes on by itself
            number = number if process.descriptors(program.pid).get(number) == link else 0
            with in_place.borrow(program.pid, number) as sock:
                replacing.put(stopped, place, number, sock)
            stopped.resume()
        now = process.descriptors(program.pid)
        assert now == {**before, 0: link}, point
        assert replacing.place_of(program.pid, 0).watches == ((epoll, events, data),), point
        if not was_killed:
            assert point > 100
            return


def computes(pid: int) -> bool:
    """It has used three clock ticks in its own code."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11]) > 2


REFUSALS = {
    "spin": ("spin", "no thread of process .* was in a system call within"),
    "full": ("read", "has no descriptor left"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_done_is_refused(case: str, start: Start) -> None:
    way, words = REFUSALS[case]
    program = start(way)
    if case == "spin":
        until(lambda: computes(program.pid), "it to compute")
    if case == "full":
        resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (len(process.descriptors(program.pid)),) * 2)
    before = process.descriptors(program.pid), vdso(program.pid)
    with pytest.raises(Refused, match=words):
        made(program.pid, patience_s=0.2)
    assert (process.descriptors(program.pid), vdso(program.pid)) == before
    if way in WAYS:
        assert ends(program, way) == f"intact {WAYS[way][2]}"


def test_a_seccomp_filter_is_refused(inside: str) -> None:
    """One that allows everything: that is not looked into."""
    program = subprocess.Popen([sys.executable, "-c", """if True:
        import ctypes, struct, time
        libc = ctypes.CDLL(None)
        libc.prctl(38, 1, 0, 0, 0)
        code = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0x7fff0000))  # return SECCOMP_RET_ALLOW
        program = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", 1, ctypes.addressof(code)))
        assert libc.prctl(22, 2, program, 0, 0) == 0
        print("waiting", flush=True)
        time.sleep(1000)"""], stdout=subprocess.PIPE)
    try:
        assert line(program) == "waiting"
        with pytest.raises(Refused, match="has a seccomp filter"):
            injection.check(program.pid)
        with pytest.raises(injection.NoThread):
            injection.stop(program.pid, 0.05)
    finally:
        program.kill()
        program.communicate()


def test_a_program_that_is_killed_meanwhile_is_gone(start: Start) -> None:
    program = start("read")
    stopped = injection.stop(program.pid, 5)
    with pytest.raises((Refused, KernelError)), injection.new_socket(stopped, socket.AF_INET):
        program.kill()
    stopped.resume()
    until(lambda: program.poll() is not None, "its end")
