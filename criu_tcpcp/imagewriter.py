"""An image directory as the destination of a pass: the side that `serve --images` runs for `dump`.

    RESTORE        the state that came is checked, as by any destination
    GRAFT          the files are written, and on the disk, where nobody looks for them yet (imagedir.py)
    CHECK_TARGET   the wanted directory is still free
    the verdict    in the journal, as of any pass: from then on the state is here
    ACTIVATE       the files get their name

It speaks on no network, so there is nothing to fence, and its Hello names no network namespace. Its journal is gone
once the origin has settled the pass: the directory says all. Written with the state, not after it, the files that a
killed writer leaves are found by their journal (`remnant`), and taken away by whatever command comes next.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from . import imagedir
from .core import imageset, messages
from .core.criu import messages as criu_messages
from .core.endpoint import Flow
from .core.errors import LinkTimeout, ProtocolError, Refused, TcpcpError
from .core.handoff import Action, DestinationState, Event
from .core.image import Image, decode
from .core.imageset import Owner
from .core.messages import Message, Stage
from .executor import event_of
from .journal import DESTINATION, LOST_MARK, Journal
from .kernel import process
from .transport.wire import Wire

_TIMEOUTS_S = {DestinationState.READY: 60.0, DestinationState.INTERRUPTED: 30.0}
_PREPARED_TIMEOUT_S = 10.0


class ImageWriter:
    """See the module."""

    def __init__(self, journal: Journal, wire: Wire, flow: Flow, place: Path, owner: Owner) -> None:
        self.name = "destination"
        self.journal = journal
        self.flow = flow
        self.nonce = secrets.token_hex(16)
        self.address_is_local, self.takes_at, self.no_route = True, "", ""  # nothing is to be sent on
        self.left: list[str] = []
        self.steps: list[tuple[str, float]] = []
        self.into, self.knows = f"images {place}", True
        self._wire = wire
        self._place = place
        self._owner = owner
        self._machine_state = DestinationState.READY
        self._message: messages.Prepare | messages.Activate | None = None
        self._interrupted = False
        self._reason = ""

    @classmethod
    def staged(cls, stage: Stage, wire: Wire, place: Path, owner: Owner) -> ImageWriter:
        """See that the files can be written there. Refused: nothing of it is left."""
        side = cls(Journal(stage.pass_id, DESTINATION), wire, Flow.from_json(stage.flow), place,
                   Owner(owner.pid, process.name(owner.pid), owner.descriptors))
        try:
            # Not under "flow": no rule of this host is this side's, and none may be taken away with it.
            side.journal.write("images", place=str(place), connection=str(side.flow), flow_json=side.flow.to_json())
            side.journal.reserve(LOST_MARK)
            imagedir.begin(place, stage.pass_id)
        except BaseException:
            side._take_back()
            raise
        return side

    @classmethod
    def recovered(cls, journal: Journal, wire: Wire, owner: Owner) -> ImageWriter:
        """For a pass that an earlier one staged."""
        images = journal.field("images")
        if images is None:
            raise ProtocolError(f"the journal knows nothing of pass {journal.pass_id}")
        side = cls(journal, wire, Flow.from_json(images["flow_json"]), Path(images["place"]), owner)
        side.name = "recovery"
        side._interrupted = True
        return side

    # -- the executor's side -------------------------------------------------------------------------------------------

    def follow(self, state: DestinationState) -> None:
        self._machine_state = state

    def failed(self, error: TcpcpError) -> None:
        self._reason = str(error)

    def timeout_s(self) -> float | None:
        return _TIMEOUTS_S.get(self._machine_state, _PREPARED_TIMEOUT_S)

    def next_event(self, timeout_s: float | None) -> Event:
        try:
            message = self._wire.receive(timeout_s)
            while isinstance(message, messages.Imminent):  # a file needs no warming up
                message = self._wire.receive(timeout_s)
        except LinkTimeout:
            return Event.TIMEOUT
        return self._received(message)

    def _received(self, message: Message) -> Event:
        event = event_of(message, self.journal.pass_id)
        match message:
            case messages.Prepare():
                if not secrets.compare_digest(message.nonce.encode(), self.nonce.encode()):
                    raise ProtocolError("a state that was not made for this pass")
                self._message = message
            case messages.Activate():
                self._message = message
            case messages.Abort():
                self._reason = message.reason
        return event

    def perform(self, action: Action) -> Event | None:
        return self._ACTIONS[action](self)

    # -- the actions ---------------------------------------------------------------------------------------------------

    def _image(self) -> Image:
        message = self._message
        if message is None:
            raise ProtocolError("there is no state to write")
        return Image(message.inet_sk, message.tcp_stream, message.extras)

    def _check_state(self) -> None:
        state = decode(self._image())
        if state.flow != self.flow:
            raise ProtocolError(f"the state is of {state.flow}, staged was {self.flow}")

    def _write_files(self) -> None:
        image, message = self._image(), self._message
        inode = criu_messages().inet_sk.FromString(image.inet_sk).ino
        imagedir.write(self._place, self.journal.pass_id, imagedir.files_of(
            image, inode, self._owner, message.app_state if message else b"", self.journal.pass_id,
            left_running=False))

    def _write_prepared(self) -> None:
        self.journal.write("prepared")

    def _send_prepared(self) -> None:
        self._wire.send(messages.Prepared(self.journal.pass_id))

    def _check_target(self) -> None:
        imagedir.refuse_unfit(self._place)

    def _decide_committed(self) -> Event:
        return self._decided(self.journal.decide("committed"))

    def _decide_aborted(self) -> Event:
        if not self.journal.exists():
            self.journal.create()
        return self._decided(self.journal.decide("aborted"))

    def _decided(self, verdict: str) -> Event:
        if verdict == "aborted":
            return Event.DECIDED_ABORTED
        if self._interrupted and (self.journal.field("active") or self._published()):
            return Event.DECIDED_ACTIVE
        return Event.DECIDED_COMMITTED

    def _published(self) -> bool:
        return holds_dump(self._place, self.journal.pass_id)

    def _nothing(self) -> None:
        """No network is spoken on."""

    def _publish(self) -> None:
        """Where the place was taken since it was looked at, the files stay where they are, complete."""
        if self._published():
            return
        try:
            imagedir.publish(self._place, self.journal.pass_id)
        except Refused as error:
            remnant = imagedir.remnant_of(self._place, self.journal.pass_id)
            if not remnant.is_dir():
                raise
            self.left.append(f"{error.message}: the images are in {remnant}")

    def _reclaim(self) -> None:
        """The activation was interrupted: the files are complete, since the verdict was written after them."""

    def _write_active(self) -> None:
        self.journal.write("active")

    def _send_committed(self) -> None:
        self._wire.send(messages.Committed(self.journal.pass_id))

    def _write_lost(self) -> None:
        self.journal.set_mark(LOST_MARK)

    def _send_active(self) -> None:
        self._wire.send(messages.Active(self.journal.pass_id, list(self.left), [],
                                        [list(step) for step in self.steps]))

    def _send_aborted(self) -> None:
        self._wire.send(messages.Aborted(self.journal.pass_id, self._reason or "it was undone"))

    def _send_lost(self) -> None:
        self._wire.send(messages.Lost(self.journal.pass_id, self._reason or "the images are gone"))

    def _take_back(self) -> None:
        imagedir.discard(self._place, self.journal.pass_id)
        if self.journal.verdict() != "committed":
            self.journal.remove()

    def close(self) -> None:
        """It holds nothing."""

    _ACTIONS: ClassVar[dict[Action, Callable[[ImageWriter], Event | None]]] = {
        Action.RESTORE: _check_state, Action.GRAFT: _write_files, Action.WRITE_PREPARED: _write_prepared,
        Action.SEND_PREPARED: _send_prepared, Action.CHECK_TARGET: _check_target,
        Action.DECIDE_COMMITTED: _decide_committed, Action.DECIDE_ABORTED: _decide_aborted,
        Action.UNFENCE: _nothing, Action.DISCARD: _take_back, Action.ACTIVATE: _publish,
        Action.RECLAIM: _reclaim, Action.WRITE_ACTIVE: _write_active,
        Action.WRITE_LOST: _write_lost, Action.SEND_COMMITTED: _send_committed,
        Action.SEND_ACTIVE: _send_active, Action.SEND_ABORTED: _send_aborted, Action.SEND_LOST: _send_lost}


def holds_dump(place: Path, dump_id: str) -> bool:
    """The directory is there, with the images of this dump."""
    with contextlib.suppress(TcpcpError):
        return imageset.about(imagedir.read(place)).get("id") == dump_id
    return False


def take_away_remnant(journal: Journal) -> None:
    """What a dump that was killed has written and not published, as either side's journal remembers it."""
    if journal.verdict() == "committed":
        return
    for record in journal.records():
        place = record.get("place")
        if isinstance(place, str) and record["record"] in ("images", "note"):
            imagedir.discard(Path(place), journal.pass_id)
