"""What the two sides say to each other, and how it lies on the wire. Pure: bytes in, messages out.

A frame is: length of what follows (u32, big endian), kind (u8), length of the header (u32), the header (JSON, the
message's plain fields and the lengths of its blobs), the blobs. Every length is checked against a bound before anything
is allocated for it; unknown kinds, fields and types are refused, and nothing may trail. Words are words (what UTF-8 can
say) and numbers are numbers (no NaN, no infinity), however deep they lie: whoever uses them need not ask again.

The conversation, origin (O) and destination (D):

    O->D  Hello      D->O  Hello                         versions; both are named when they differ
    O->D  Stage      D->O  Staged | Refused              everything slow, nothing stopped yet
    O->D  Dig                       D->O  Dug | Refused          a tunnel for the packets, where one is needed
    O->D  Lay                       D->O  Dug | Refused          or the link itself for the packets
    O->D  Back                      D->O  Dug | Refused          what is said goes back through the origin
    O->D  Imminent, then Prepare    D->O  Prepared | Aborted     the state; a dormant connection
    O->D  Commit     D->O  Committed, then Active        the commit point lies between Commit and Committed
    O->D  Adopt      D->O  Adopted | Refused             the local address moves: asked beforehand, done behind Active
    O->D  Abort      D->O  Aborted
    O->D  Query      D->O  Aborted | Committed | Active | Lost
                                                         after a failure: a Query of what was not committed aborts it
    O->D  Activate   D->O  Active | Lost                 the state again, where the activation was interrupted
    O->D  Settled                                        never asked about again
    O->D  Carry      D->O  Carrying | Ended | Refused    from Carrying on, both ways: Packets,
                                                         Flush -> Flushed, until Ended
    B->A  Onward, then A->B Dig, Listen (for C) as above, then Settled | Refused
                                                         what A passed to B was passed on to C (onward.py)
    A->B  Where      B->A  Onward, as above, or Settled
    O->D  Try        D->O  Tried | Refused               can that host take connections? (check --host)
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .errors import ProtocolError
from .state import MAX_CARRIED

PROTOCOL = 10  # one more for every message, field or meaning that is new
_LENGTH = struct.Struct(">I")
_HEAD = struct.Struct(">BI")
MAX_HEADER = 1 << 16
MAX_FRAME = MAX_CARRIED + (1 << 20)  # the queues and the application's state, and what describes them
MAX_SMALL_FRAME = 1 << 16  # of every message without queues
MAX_PROLOGUE = 1 << 15  # bytes

Step = list[Any]  # [name, milliseconds]


@dataclass(frozen=True)
class Message:
    """Base: plain fields are JSON values, `bytes` fields travel as blobs."""

    kind: ClassVar[int]
    limit: ClassVar[int] = MAX_SMALL_FRAME


@dataclass(frozen=True)
class Hello(Message):
    """`boot_id`, `network`: which running kernel, and which network namespace (device, inode) the speaker is in."""

    kind = 1
    protocol: int
    version: str
    host: str
    boot_id: str
    network: list[int]


@dataclass(frozen=True)
class Stage(Message):
    """`inet_sk`: the connection's inet_sk_entry while it still runs; Prepare's is the one that counts. `max_stall_ms`:
    how long the pass may take before the offer. `prologue`: what the program there reads before the peer's bytes, if
    `has_prologue`. `idle_ms`: how long the origin may look for a quiet instant before that. `needs`: what the
    connection has and not every kernel can do, by the name of the refusal. `path`: the hosts that passed it before,
    each "ADDRESS ID" (onward.py)."""

    kind = 2
    pass_id: str
    flow: dict[str, Any]
    into: str
    redirect: str
    inet_sk: bytes
    max_stall_ms: int
    has_prologue: bool = False
    prologue: bytes = field(default=b"", repr=False)
    idle_ms: int = 0
    needs: list[str] = field(default_factory=list)
    path: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Staged(Message):
    """`nonce` must come back with Prepare: an old state cannot be played again. `address_is_local`: the destination has
    the flow's local address itself. `into`: what was found, for the report. `knows`: the program there takes part in
    passes; else it is an unmodified one. `takes_at`: where packets for it go, if not to the host that SSH reached.
    `no_route`: why that host cannot reach the peer by itself."""

    kind = 3
    pass_id: str
    nonce: str
    address_is_local: bool
    into: str
    knows: bool
    takes_at: str = ""
    no_route: str = ""


@dataclass(frozen=True)
class Refused(Message):
    """`refusal`: the name, where it has one (refusals.py)."""

    kind = 4
    pass_id: str
    reason: str
    hint: str
    refusal: str = ""


@dataclass(frozen=True)
class Prepare(Message):
    """The connection's image; of a UDP socket `tcp_stream` holds its queue (image.py)."""

    kind = 5
    limit = MAX_FRAME
    pass_id: str
    nonce: str
    inet_sk: bytes = field(repr=False)
    tcp_stream: bytes = field(repr=False)
    extras: bytes = field(repr=False)
    app_state: bytes = field(repr=False)


@dataclass(frozen=True)
class Prepared(Message):
    kind = 6
    pass_id: str


@dataclass(frozen=True)
class Commit(Message):
    """`elapsed_ms`: since the state was read, by the origin's clock: the TSval clock must not fall behind it."""

    kind = 7
    pass_id: str
    elapsed_ms: int


@dataclass(frozen=True)
class Committed(Message):
    kind = 8
    pass_id: str


@dataclass(frozen=True)
class Active(Message):
    """`left`: what the destination could not clean up. `notes`: what it could not carry and does no harm. `steps`: what
    it did."""

    kind = 9
    pass_id: str
    left: list[str]
    notes: list[str]
    steps: list[Step]


@dataclass(frozen=True)
class Abort(Message):
    kind = 10
    pass_id: str
    reason: str


@dataclass(frozen=True)
class Aborted(Message):
    kind = 11
    pass_id: str
    reason: str


@dataclass(frozen=True)
class Query(Message):
    kind = 12
    pass_id: str


@dataclass(frozen=True)
class Activate(Message):
    kind = 13
    limit = MAX_FRAME
    pass_id: str
    elapsed_ms: int
    inet_sk: bytes = field(repr=False)
    tcp_stream: bytes = field(repr=False)
    extras: bytes = field(repr=False)
    app_state: bytes = field(repr=False)


@dataclass(frozen=True)
class Lost(Message):
    kind = 14
    pass_id: str
    reason: str


@dataclass(frozen=True)
class Settled(Message):
    """The origin will not ask about this pass again: the destination may forget that it committed, and says the same
    back."""

    kind = 15
    pass_id: str


@dataclass(frozen=True)
class Ask(Message):
    """Is the connection still there? Asked by a host that passed it away and still sends its packets on."""

    kind = 16
    pass_id: str
    flow: dict[str, Any]


@dataclass(frozen=True)
class Standing(Message):
    """`stands`: the connection is alive here, or was passed on from here."""

    kind = 17
    pass_id: str
    stands: bool


@dataclass(frozen=True)
class Imminent(Message):
    """Prepare follows within milliseconds, unless the origin finds no quiet instant: be awake. No answer."""

    kind = 20
    pass_id: str


@dataclass(frozen=True)
class Dig(Message):
    """Make your end of a tunnel, from `here`, your address, to `there`, mine: the packets of this pass come by it."""

    kind = 21
    pass_id: str
    here: str
    there: str


@dataclass(frozen=True)
class Dug(Message):
    """It is made, and the connection's packets are let out of it."""

    kind = 22
    pass_id: str


@dataclass(frozen=True)
class Listen(Message):
    """Listen for a packet of this connection of at least `size` bytes that no peer sends: until you have answered I
    send such by the way on which the connection's are to come."""

    kind = 23
    pass_id: str
    size: int


@dataclass(frozen=True)
class Heard(Message):
    """`heard`: one came."""

    kind = 24
    pass_id: str
    heard: bool


@dataclass(frozen=True)
class Adopt(Message):
    """Have the local address of this pass's connection; I, whose interface has this `hardware` address, have removed it
    if `now`, and only ask whether you could if not. `address`: as core/address.py has it."""

    kind = 25
    pass_id: str
    address: dict[str, Any]
    hardware: str
    now: bool


@dataclass(frozen=True)
class Adopted(Message):
    """I have it, or could. Refused: I have not. `left`: what could not be done, or ''."""

    kind = 26
    pass_id: str
    left: str = ""


@dataclass(frozen=True)
class Back(Message):
    """Send what you say for this connection to me: by the tunnel from `here`, your address, to `there`, or, without
    `here`, to that address on your link. After Dug, packets of the connection of `size` bytes that nobody sends, until
    I say whether one was heard."""

    kind = 27
    pass_id: str
    here: str
    there: str
    size: int


@dataclass(frozen=True)
class Onward(Message):
    """The connection of this pass of yours lives where packets for `via` go, now: send its packets there. Until you say
    Settled or Refused, what you say to a destination I say to that one."""

    kind = 28
    pass_id: str
    via: str


@dataclass(frozen=True)
class Where(Message):
    """Have you passed on what I passed to you? Onward says yes, Settled no."""

    kind = 29
    pass_id: str


@dataclass(frozen=True)
class Lay(Message):
    """Make your end of a channel: the packets of this pass travel over this link. `mtu`: of the way from me to the
    peer, bytes. `boot_id`, `network`: as of Hello, for the way back."""

    kind = 30
    pass_id: str
    mtu: int
    boot_id: str
    network: list[int]


@dataclass(frozen=True)
class Carry(Message):
    """The pass is over: begin, or begin again."""

    kind = 31
    pass_id: str


@dataclass(frozen=True)
class Carrying(Message):
    """What follows, in both directions, is Packets."""

    kind = 32
    pass_id: str


@dataclass(frozen=True)
class Packets(Message):
    """Whole IP packets of the connection, one behind the other; none is a sign of life."""

    kind = 33
    packets: bytes = field(repr=False)


@dataclass(frozen=True)
class Ended(Message):
    """The connection has ended, or is not here any more, and nothing is left to be carried."""

    kind = 34


@dataclass(frozen=True)
class Flush(Message):
    """Say the same number back once all that came before this is on its way."""

    kind = 35
    number: int


@dataclass(frozen=True)
class Flushed(Message):
    kind = 36
    number: int


@dataclass(frozen=True)
class Try(Message):
    """Try what a pass needs, at the other host. `feature`: only this one, or '' for all."""

    kind = 18
    feature: str


@dataclass(frozen=True)
class Tried(Message):
    """`features`: objects as `check --json` prints them."""

    kind = 19
    features: list[dict[str, Any]]


_KINDS: dict[int, type[Message]] = {
    message.kind: message
    for message in (Hello, Stage, Staged, Refused, Prepare, Prepared, Commit, Committed, Active, Abort, Aborted, Query,
                    Activate, Lost, Settled, Ask, Standing, Try, Tried, Imminent, Dig, Dug, Listen,
                    Heard, Adopt, Adopted, Back, Onward, Where, Lay, Carry, Carrying, Packets, Ended, Flush,
                    Flushed)}


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


def _is_step(value: Any) -> bool:
    """A time of more than a day is none."""
    return (type(value) is list and len(value) == 2 and type(value[0]) is str and type(value[1]) in (int, float)
            and 0 <= value[1] < 1e8)


#: The annotation of a field -> its JSON type, and what holds for each element of a list.
_TYPES: dict[str, tuple[type, Callable[[Any], bool] | None]] = {
    "int": (int, None), "str": (str, None), "bool": (bool, None), "bytes": (bytes, None),
    "dict[str, Any]": (dict, None), "list[int]": (list, _is(int)), "list[str]": (list, _is(str)),
    "list[Step]": (list, _is_step), "list[dict[str, Any]]": (list, _is(dict))}


def _fields(kind: type[Message]) -> Iterator[tuple[str, type, Callable[[Any], bool] | None]]:
    return ((one.name, *_TYPES[str(one.type)]) for one in dataclasses.fields(kind))


def encode(message: Message) -> bytes:
    """The message as a frame. What is no text (a file's name may be any bytes) is sent with marks in those places."""
    header: dict[str, Any] = {}
    blobs: list[bytes] = []
    for name, type_, _is_element in _fields(type(message)):
        value = getattr(message, name)
        if type_ is bytes:
            blobs.append(value)
        else:
            header[name] = value
    header["blobs"] = [len(blob) for blob in blobs]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    size = _HEAD.size + len(text) + sum(header["blobs"])
    if len(text) > MAX_HEADER or size > MAX_FRAME:
        raise ProtocolError(f"a {type(message).__name__} of {size} bytes is too large to send")
    return b"".join([_LENGTH.pack(size), _HEAD.pack(message.kind, len(text)), text, *blobs])


class Decoder:
    """Collects bytes and gives out the messages in them. After a ProtocolError the stream is unusable."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Raises ProtocolError for the first frame that is not a message; those before it are lost with the stream."""
        self._buffer += data
        found: list[Message] = []
        while (size := self._complete()) is not None:
            with memoryview(self._buffer) as whole, whole[_LENGTH.size:_LENGTH.size + size] as frame:
                found.append(_decode(frame))  # what it keeps is a copy
            del self._buffer[:_LENGTH.size + size]
        return found

    def _complete(self) -> int | None:
        """The length of the frame at the front if all of it is here. A bad one is refused at its first bytes."""
        if len(self._buffer) < _LENGTH.size + 1:
            return None
        size = int(_LENGTH.unpack_from(self._buffer)[0])
        kind = _KINDS.get(self._buffer[_LENGTH.size])
        if kind is None:
            raise ProtocolError(f"message of unknown kind {self._buffer[_LENGTH.size]}: "
                                "not criu-tcpcp at the other end?")
        if not _HEAD.size <= size <= kind.limit + _HEAD.size:
            raise ProtocolError(f"a {kind.__name__} of {size} bytes is out of bounds")
        return size if len(self._buffer) >= _LENGTH.size + size else None


def _decode(frame: memoryview) -> Message:
    number, header_length = _HEAD.unpack_from(frame)
    kind = _KINDS[number]
    if header_length > min(MAX_HEADER, len(frame) - _HEAD.size):
        raise ProtocolError(f"the header of a {kind.__name__} is longer than the message")
    position = _HEAD.size + header_length
    try:
        header = json.loads(bytes(frame[_HEAD.size:position]))
        json.dumps(header, ensure_ascii=False, allow_nan=False).encode()  # ValueError: half a surrogate pair, or NaN
        lengths = header.pop("blobs")
        if type(lengths) is not list:
            raise ValueError("the lengths of the blobs are not a list")
        values: dict[str, Any] = {}
        for name, type_, is_element in _fields(kind):
            if type_ is bytes:
                length = lengths.pop(0)
                if type(length) is not int or not 0 <= length <= len(frame) - position:
                    raise ValueError("a blob is longer than the message")
                values[name] = bytes(frame[position:position + length])
                position += length
            else:
                values[name] = header.pop(name)
                if type(values[name]) is not type_:
                    raise ValueError(f"{name} is not a {type_.__name__}")
                if is_element is not None and not all(map(is_element, values[name])):
                    raise ValueError(f"{name} has an element of another kind")
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RecursionError) as error:
        raise ProtocolError(f"malformed {kind.__name__}: {error}") from None
    if header or lengths or position != len(frame):
        raise ProtocolError(f"a {kind.__name__} has unknown fields or trailing bytes")
    return kind(**values)
