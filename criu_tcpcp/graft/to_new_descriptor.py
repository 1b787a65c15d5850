"""Into a program that has no descriptor for it: it makes a socket (kernel/injection.py), and that becomes the
connection in place (in_place.py).

Why it makes one, and is not sent one: that takes a single system call, which cannot block, needs no memory of the
program's and no way between it and this tool; and the socket is its own, as of the user that it runs as.

That happens while staging. The socket is in the journal before the program can go on with it, so that it is closed
again where the pass is undone, whoever does that; and if this process is killed before, the program closes it by
itself. It stays blocking and close-on-exec. The program knows nothing of it until somebody tells it the number, by an
interface of its own or a debugger.
"""

from __future__ import annotations

from ..core.endpoint import Flow
from ..journal import Journal
from ..kernel import injection, process, tcpinfo
from ..kernel.process import Identity
from . import Ground, Vessel, in_place
from .in_place import IntoProgram, ProgramSocket, named

_TIMEOUT_S = 1.0  # nobody waits for it yet


class ToNewDescriptor(IntoProgram):
    """The lowest descriptor that is free while staging."""

    def __init__(self, program: Identity) -> None:
        super().__init__(f"pid:{program.pid}", frozenset({program.pid}))
        self._program = program

    @property
    def description(self) -> str:
        if self._taken is None:
            return f"a new descriptor of {named(self._program.pid)}"
        return super().description

    def arrange(self, flow: Flow, ground: Ground) -> None:
        in_place.refuse_prologue(ground)
        ground.admit(self.takers())
        made = self._made(flow, ground.journal)
        try:
            self._take(made, ground.journal)
        except BaseException:
            made.end()
            raise

    def _made(self, flow: Flow, journal: Journal) -> ProgramSocket:
        pid = self._program.pid
        tracee = injection.stop(pid, _TIMEOUT_S)
        try:
            with injection.new_socket(tracee, flow.socket_family, flow.protocol) as descriptor, \
                    in_place.borrow(pid, descriptor) as sock:
                inode = process.socket_inode(process.descriptors(pid)[descriptor]) or 0
                made = ProgramSocket(self._program, descriptor, inode, tcpinfo.cookie(sock), is_injected=True)
                made.record(journal)
                return made
        finally:
            tracee.resume()

    def vessel(self, flow: Flow) -> Vessel:
        """As new, and the connection's options are for it: the program has not set any."""
        vessel = super().vessel(flow)
        return Vessel(vessel.sock, vessel.options, own=False)


def of_process(pid: int) -> ToNewDescriptor:
    """Refused, with the reason, where this program cannot be given a descriptor."""
    program = in_place.check_program(pid)
    injection.check(pid)
    return ToNewDescriptor(program)
