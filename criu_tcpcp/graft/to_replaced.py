"""Into a descriptor that a program has of something else: a pipe, a terminal, /dev/null, a unix socket.

The program makes a socket (to_new_descriptor.py), which becomes the connection under a number of its own. When the pass
is committed, and before the connection is alive, it takes the descriptor's place (replacing.py): until then whatever
fails leaves the descriptor as it was. A thread that waits in a read of it then waits for the peer.
"""

from __future__ import annotations

from ..core.endpoint import Flow
from ..core.errors import Refused
from ..journal import Journal
from ..kernel import injection
from ..kernel.process import Identity
from . import Vessel, in_place
from .in_place import ProgramSocket, named
from .replacing import Place, place_of
from .to_new_descriptor import ToNewDescriptor


class ToReplaced(ToNewDescriptor):
    """The number is known beforehand, and reported."""

    def __init__(self, program: Identity, place: Place) -> None:
        super().__init__(program)
        self.way = f"pid:{program.pid}:{place.descriptor}"
        self._place = place

    @property
    def description(self) -> str:
        return f"{named(self._program.pid)}, descriptor {self._place.descriptor}, {self._place.link} until then"

    def _made(self, flow: Flow, journal: Journal) -> ProgramSocket:
        made = super()._made(flow, journal)
        made.place = self._place
        made.record(journal)
        return made

    def vessel(self, flow: Flow) -> Vessel:
        """From here on the program stands still, so what is written now of the descriptor stays true."""
        vessel = super().vessel(flow)
        taken = self._need()
        place = place_of(self._program.pid, self._place.descriptor)
        if place.link != self._place.link:
            raise Refused(f"descriptor {place.descriptor} of {named(self._program.pid)} is {place.link} now, and was "
                          f"{self._place.link}")
        taken.place = place
        taken.record_again()
        return vessel


def at(pid: int, descriptor: int) -> ToReplaced:
    """Refused, with the reason, where this descriptor of this program cannot be replaced."""
    program = in_place.check_program(pid)
    injection.check(pid)
    return ToReplaced(program, place_of(pid, descriptor))
