"""A TCP socket that a running program has becomes the connection where it is: descriptor number, epoll registrations,
options, owner and limits are the program's own, and nothing is written into its memory or run in it. (How it comes to
have one is another matter: to_accept.py, to_new_descriptor.py.)

    stop      all threads of the program (kernel/tracee.py): it sees nothing of what follows
    empty     in repair, connect(AF_UNSPEC): the socket has no connection any more, and nothing was sent. This also puts
              it on the ready list of every epoll instance that watches it, so that whatever is restored into it is
              noticed (net/ipv4/tcp.c tcp_disconnect, sk_error_report)
    restore   as into a new socket; then the program runs again. A thread that was blocked in recv restarts it.

Before the program runs again for another reason, the socket is ended as a peer that closes would have ended it: the
program reads a clean end of stream. When this process is killed, the kernel lets the program run at once; a socket that
it finds in repair then answers EPERM or EINVAL, on a connection that it accepted from nobody, until `abandon`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from collections.abc import Iterable, Iterator

from .. import endpoints
from ..core.endpoint import Flow
from ..core.errors import KernelError, LinkError, Refused
from ..core.policy import NO_PORT, Taker
from ..journal import Journal
from ..kernel import injection, netns, process, sockopt, syscalls, tcpinfo
from ..kernel.process import Identity
from ..kernel.tracee import Tracee
from . import Ground, Reclaimed, Vessel, replacing, taker_of
from .replacing import Place

STOP_TIMEOUT_S = 0.2
TAKEN, ALIVE_MARK, BRACED = "taken", "alive", "braced"


class Closed(Refused):
    """The program has closed the socket."""


def check_program(pid: int) -> Identity:
    """Refused, with the reason, where this process cannot be stopped and given a connection."""
    identity = process.identity(pid)
    who = named(pid)
    if process.is_32_bit(pid):
        raise Refused(f"{who} is a 32-bit program, whose registers this tool does not know")
    tracer = process.tracer_of(pid)
    if tracer:
        raise Refused(f"{who} is traced by process {tracer} ({process.name(tracer)}) already",
                      hint="a program has one tracer at a time: end that one")
    try:
        here = netns.identity(process.network_namespace(pid)) == netns.own()
    except KernelError as error:
        raise Refused(f"{who} may not be looked at: {error.message}", hint="root is needed there") from None
    if not here:  # it has the socket from a process of this one
        raise Refused(f"{who} is in another network namespace than the socket at which it accepts")
    return identity


class ProgramSocket:
    """One socket of one program, by the descriptor under which it was found, and by inode and cookie: what has another
    is another. A copy of it (`sock`) is held only while the program stands still: else its close would not be the last
    one, nothing would be sent, and its epoll instances would go on telling of it."""

    def __init__(self, program: Identity, descriptor: int, inode: int, cookie: int, *,
                 is_injected: bool = False) -> None:
        """`is_injected`: the program had to make it for us, and does not know it (to_new_descriptor.py)."""
        self.program, self.descriptor, self.inode, self.cookie = program, descriptor, inode, cookie
        self.is_injected = is_injected
        self.place: Place | None = None  # which it will take (to_replaced.py)
        self.was_left_stopped = False  # by the `brace` of a serve that was killed
        self.is_emptied = False
        self._sock: socket.socket | None = None
        self._tracee: Tracee | None = None
        self._journal: Journal | None = None

    @classmethod
    def of_inode(cls, pid: int, inode: int, cookie: int) -> ProgramSocket | None:
        """None where the process has no such socket."""
        for number, link in process.descriptors(pid).items():
            if process.socket_inode(link) == inode:
                return cls(process.identity(pid), number, inode, cookie)
        return None

    @classmethod
    def of_journal(cls, journal: Journal) -> ProgramSocket | None:
        """What an earlier serve took for this pass; None where the program or the socket has gone."""
        taken = journal.field(TAKEN)
        if taken is None or not process.is_alive(Identity(*taken["taker"])):
            return None
        found = cls.of_inode(taken["taker"][0], taken["inode"], taken["cookie"])
        if found is not None:
            number = taken.get("descriptor", found.descriptor)
            if process.socket_inode(process.descriptors(found.program.pid).get(number, "")) == found.inode:
                found.descriptor = number  # it may be in its place already, under another one too
            found.is_injected = taken.get("injected", False)
            found.place = Place.from_json(taken["place"]) if taken.get("place") else None
            found._journal = journal
            found.was_left_stopped = (journal.field(BRACED) is not None
                                      and process.run_state(found.program.pid) == "T")
        return found

    def record(self, journal: Journal) -> None:
        """So that whoever comes later finds it again."""
        self._journal = journal
        journal.reserve(ALIVE_MARK)
        self.record_again()

    def record_again(self) -> None:
        if self._journal is not None:
            self._journal.write(TAKEN, taker=self.program.to_json(), inode=self.inode, cookie=self.cookie,
                                descriptor=self.descriptor, injected=self.is_injected,
                                place=self.place.to_json() if self.place else None)

    # -- the program stands still --------------------------------------------------------------------------------------

    @property
    def sock(self) -> socket.socket:
        if self._sock is None:
            raise Refused("the program was not stopped")
        return self._sock

    def take(self) -> None:
        """Stop the program and copy the socket. Refused where it cannot be stopped in time, or has closed it; then it
        runs."""
        tracee = self._stop()
        try:
            self._sock = self._borrow()
        except BaseException:
            tracee.resume()
            raise
        self._tracee = tracee

    def _stop(self) -> Tracee:
        if self.is_injected:  # then it can be taken out again
            return injection.stop(self.program.pid, STOP_TIMEOUT_S)
        tracee = Tracee(self.program.pid)
        tracee.stop(STOP_TIMEOUT_S)
        return tracee

    def _borrow(self) -> socket.socket:
        if not process.is_alive(self.program):
            raise Closed(f"process {self.program.pid} has exited")
        sock = borrow(self.program.pid, self.descriptor)
        if tcpinfo.cookie(sock) != self.cookie:
            sock.close()
            raise Closed(f"process {self.program.pid} has closed descriptor {self.descriptor} since")
        return sock

    def resume(self) -> None:
        """The program runs, and has its socket for itself."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        tracee, self._tracee = self._tracee, None
        if tracee is not None:
            tracee.resume()
        if self.was_left_stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.program.pid, signal.SIGCONT)

    def empty(self) -> Vessel:
        """Whatever the socket was connected to is given up, without a packet."""
        options = sockopt.read_all(self.sock)
        self.is_emptied = True
        endpoints.of_socket(self.sock).empty(self.sock)
        return Vessel(self.sock, options, own=True)

    def brace(self, unwritten: bool) -> None:
        """The connection is about to come alive. What the program writes must stay behind what was written for it: with
        bytes left to be written, it does not run even when this process is killed."""
        if self.place is not None and self._tracee is not None:
            replacing.put(self._tracee, self.place, self.descriptor, self.sock)
            self.descriptor = self.place.descriptor
        if self._journal is not None:
            self._journal.set_mark(ALIVE_MARK)
        if unwritten and self._tracee is not None and not self.was_left_stopped:
            if self._journal is not None:
                self._journal.write(BRACED)
            self._tracee.pin()

    def activate(self) -> None:
        """The program runs. LinkError where it has ended: its end of the connection goes with it."""
        self.resume()
        if not process.is_alive(self.program):
            raise LinkError(f"process {self.program.pid} has exited")

    def end(self, *, unless_untouched: bool = False) -> None:
        """The program reads an end of stream; the peer, whoever it was, hears nothing. A program that has closed it
        needs nothing. `unless_untouched`: what is as the program made it stays so. One that is injected is closed."""
        with contextlib.suppress(Closed):
            try:
                if self._sock is None:
                    try:
                        self.take()
                    except (Refused, KernelError):  # it cannot be stopped: then it runs on meanwhile
                        self._sock = self._borrow()
                endpoint = endpoints.of_socket(self.sock)
                if not unless_untouched or endpoint.is_dormant(self.sock) or endpoint.is_empty(self.sock):
                    endpoint.take_away(self.sock)
                    self._take_out()
            finally:
                self.resume()

    def _take_out(self) -> None:
        """The program closes what it has made for us. Where it cannot, a descriptor stays that leads nowhere."""
        is_in_place = self.place is not None and self.place.descriptor == self.descriptor
        if self.is_injected and not is_in_place and self._tracee is not None:
            with contextlib.suppress(Refused, KernelError):
                injection.close(self._tracee, self.descriptor)


def first_of(pids: Iterable[int], inode: int, cookie: int) -> ProgramSocket | None:
    """This socket, of the first of these processes that has it."""
    for pid in pids:
        with contextlib.suppress(Refused):  # it has exited
            found = ProgramSocket.of_inode(pid, inode, cookie)
            if found is not None:
                return found
    return None


class IntoProgram:
    """A way in that restores into a socket of the program's own: what all of these have in common, and by itself the
    way to what an earlier serve took (`reclaim`). What differs is how the socket is come by (`arrange`)."""

    stops = True

    def __init__(self, way: str, candidates: frozenset[int], port: int = NO_PORT) -> None:
        """`candidates`: the processes of which one will have it. `port`: where they wait for connections."""
        self.way = way
        self.candidates, self.port = candidates, port
        self.taker = Identity(0, 0)
        self._taken: ProgramSocket | None = None

    @property
    def description(self) -> str:
        if self._taken is None:
            return self.way
        return f"{named(self.taker.pid)}, descriptor {self._taken.descriptor}"

    def takers(self) -> list[Taker]:
        pids = {self._taken.program.pid} if self._taken is not None else self.candidates
        return [taker_of(pid, self.port) for pid in sorted(pids)]

    def _take(self, taken: ProgramSocket, journal: Journal) -> None:
        """Once its program was seen to stop, and goes on: what has to be done in the freeze is quicker when it was done
        before, and what cannot be done is refused before anybody waits for it."""
        taken.take()
        sockopt.read_all(taken.sock)
        taken.resume()
        if not taken.is_injected:  # which was recorded before the program had it
            taken.record(journal)
        self._taken, self.taker = taken, taken.program

    def _need(self) -> ProgramSocket:
        if self._taken is None:
            raise Refused("the pass was not staged")
        return self._taken

    def arrange(self, flow: Flow, ground: Ground) -> None:
        """The socket is known, and its program goes on."""
        raise Refused("the program that had the connection is not there any more")

    def vessel(self, flow: Flow) -> Vessel:
        """From here on the program stands still."""
        taken = self._need()
        taken.take()
        return taken.empty()

    def graft(self, pass_id: str, sock: socket.socket, flow: Flow, app_state: bytes) -> None:
        """It is the program's already. Refused where there is more than it can be given."""
        if app_state:
            raise Refused("a program that knows nothing of passes cannot be given the application's state",
                          hint="--into receiver[:PATH]")

    def check(self) -> None:
        """Refused where the program has gone since."""
        if not process.is_alive(self._need().program):
            raise Refused(f"{named(self.taker.pid)} has exited")

    def brace(self, unwritten: bool) -> None:
        self._need().brace(unwritten)

    def activate(self, pass_id: str) -> None:
        self._need().activate()

    def discard(self, pass_id: str) -> None:
        """The program reads an end of stream."""
        taken, self._taken = self._taken, None
        if taken is not None:
            taken.end()

    def reclaim(self, journal: Journal) -> Reclaimed:
        """What became of the socket that an earlier serve took for the pass. Refused where the connection has lived
        with the program and ended there."""
        was_alive = journal.has_mark(ALIVE_MARK)
        taken = self._taken = ProgramSocket.of_journal(journal)
        ended = Refused("the program that had the connection has ended it")
        try:
            if taken is None:
                raise Closed("the program has closed it")
            taken.take()
        except Closed:
            if was_alive:
                raise ended from None
            return Reclaimed()
        self.taker = taken.program
        endpoint = endpoints.of_socket(taken.sock)
        if not endpoint.is_alive(taken.sock):  # never, or it has ended
            taken.is_injected = taken.is_injected and not was_alive  # the program may have been told of it
            taken.end()
            if was_alive:
                raise ended
            return Reclaimed()
        if not endpoint.is_dormant(taken.sock) and not taken.was_left_stopped:
            taken.resume()
            return Reclaimed(delivered=was_alive)
        return Reclaimed(taken.sock, own=True)

    def close(self) -> None:
        if self._taken is not None:
            self._taken.resume()


def refuse_prologue(ground: Ground) -> None:
    """Refused where there is one: this way in begins with no conversation."""
    if ground.prologue is not None:
        raise Refused("a prologue can be said only to a connection that the program has just accepted",
                      hint="--into accept:PID or listen:PORT")


def named(pid: int) -> str:
    return f"process {pid} ({process.name(pid)})"


@contextlib.contextmanager
def stopped(pids: set[int]) -> Iterator[None]:
    """These programs stand still for the block. One that cannot be stopped runs on."""
    with contextlib.ExitStack() as stack:
        for pid in pids:
            with contextlib.suppress(Refused, KernelError):
                tracee = Tracee(pid)
                tracee.stop(STOP_TIMEOUT_S)
                stack.callback(tracee.resume)
        yield


def borrow(pid: int, descriptor: int) -> socket.socket:
    try:
        pidfd = syscalls.pidfd_open(pid)
    except KernelError:
        raise Closed(f"process {pid} has exited") from None
    try:
        return syscalls.borrow_socket(pidfd, descriptor)
    except KernelError as error:
        if error.errno == errno.EPERM:
            raise Refused(f"descriptor {descriptor} of process {pid} may not be taken", hint="root is needed there") \
                from None
        raise Closed(f"process {pid} has no socket at descriptor {descriptor}") from None
    finally:
        os.close(pidfd)
