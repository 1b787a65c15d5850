"""Packets of a passed connection travel over the link between the two hosts, for as long as it lives.

    peer ──► origin host: moved ─► TUN ─► carrier ══ the SSH channel ══► serve ─► TUN ─► the connection
    peer ◄── raw socket ◄──────────────── carrier ◄═════════════════════ serve ◄─ TUN ◄─ routing rule

One process at each host does it, and neither holds anything that the connection could not do without for a while: when
one is killed, or the link breaks, both end. Devices, rules and routes stand (kernel/channel.py), what is sent meanwhile
is lost, which TCP puts right, and `resolve` begins again. A file of the journal says that it is to be so, and its lock,
who does it; it goes with the connection.

Nothing grows without bound: what the link does not take waits in the device's queue, and is dropped where that is full.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator

from .core.endpoint import Flow
from .core.errors import JournalError, KernelError, LinkError, ProtocolError, Refused
from .core.messages import Ended, Flush, Flushed, Packets, encode
from .core.packets import Sieve, split
from .journal import DESTINATION, LAID, Journal, all_journals
from .kernel import channel as channels
from .kernel import process
from .kernel.channel import Channel
from .transport.wire import Wire

FILE = "carrier"
_BELL = "bell"  # a socket beside it: whoever rings is answered when all has left that was sent before
_AT_ONCE = 32_000  # bytes of packets in a message, and at most that of the last
_ROOM = 1 << 18  # bytes that wait for the link before no more is read
_LOOK_S = 0.5  # between two looks whether the connection is still there
_SILENCE_S = 10.0  # without a word the link is taken for broken: each side says one a second
_WORD_S = 1.0
_END_S = 5.0


# -- who carries -------------------------------------------------------------------------------------------------------

def want(journal: Journal) -> None:
    """From now on the journal says that somebody should."""
    os.close(_open(journal))


def _open(journal: Journal) -> int:
    try:
        return os.open(journal.directory / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise JournalError(f"cannot write that packets are carried: {error.strerror}") from None


def is_wanted(journal: Journal) -> bool:
    return (journal.directory / FILE).exists()


def carrier_of(journal: Journal) -> int:
    """The process that does it, at this host; 0 where none does."""
    try:
        descriptor = os.open(journal.directory / FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return 0
    except BlockingIOError:
        text = os.read(descriptor, 20)
        return int(text) if text.isdigit() else 0
    finally:
        os.close(descriptor)


def claim(journal: Journal) -> int:
    """This process does it, until it closes the descriptor. Refused where another does."""
    descriptor = _open(journal)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        sign(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        raise Refused(f"the packets of pass {journal.pass_id} are carried by another process") from None
    return descriptor


def sign(descriptor: int) -> None:
    """Of a claim: it is this process that has it now."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)


def end(journal: Journal) -> None:
    """Nobody at this host does it any more when this returns. JournalError where the process does not end."""
    deadline = time.monotonic() + _END_S
    pid = 0
    while found := carrier_of(journal):
        if found != pid:
            pid = found
            if found != os.getpid() and process.name(found).startswith("tcpcp-"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(found, signal.SIGTERM)
        if time.monotonic() > deadline:
            raise JournalError(f"process {found}, which carries the packets of pass {journal.pass_id}, does not end")
        time.sleep(0.01)


def over(journal: Journal) -> None:
    """The connection has ended, or lives where nothing has to be carried to: the device and what leads into it go, in
    the calling thread's network namespace, and nobody is to carry any more."""
    for name in (FILE, _BELL):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(journal.directory / name)
    channels.delete(channels.name_of(journal.pass_id))


def clear(journal: Journal, flow: Flow, boot_id: str, network: list[int] | None = None) -> None:
    """Earlier passes of this connection carried its packets between the same two hosts; it came home, and now goes
    again. Refused where another host carries them here. `boot_id`, `network`: of the origin, for a destination."""
    for other in all_journals():
        if other.side != journal.side or other.pass_id == journal.pass_id or not is_wanted(other):
            continue
        first, laid = other.field("intent") or other.field("staged"), other.field(LAID)
        if first is None or Flow.from_json(first["flow"]).plain != flow.plain:
            continue
        if laid is not None and (laid["origin_boot"], laid["origin_network"]) != (boot_id, network):
            raise Refused("the destination gets the connection's packets from another host by an SSH channel",
                          hint=f"there: criu-tcpcp release {other.pass_id}")
        end(other)
        over(other)


def pass_to_here(flow: Flow) -> Journal | None:
    """By which this connection came here, if its packets are carried here and from here."""
    for journal in all_journals():
        if journal.side == DESTINATION and is_wanted(journal):
            staged = journal.field("staged")
            if staged is not None and Flow.from_json(staged["flow"]).plain == flow.plain:
                return journal
    return None


def way_home(journal: Journal, boot_id: str, network: list[int]) -> tuple[str, int] | None:
    """The device by which the connection was carried here, if that was from this host: its name and index."""
    laid, name = journal.field(LAID), channels.name_of(journal.pass_id)
    if laid is None or (laid["origin_boot"], laid["origin_network"]) != (boot_id, network):
        return None
    index = channels.index_of(name)
    return (name, index) if index else None


def flush(journal: Journal, timeout_s: float) -> bool:
    """What the connection has sent so far is on its way to the peer at the host that it leaves by. False where nobody
    says so in time."""
    own = journal.directory / f"{_BELL}.{os.getpid()}"
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as ringer:
        try:
            ringer.bind(str(own))
            ringer.settimeout(timeout_s)
            ringer.sendto(b"", str(journal.directory / _BELL))
            ringer.recv(1)
            return True
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(own)
    return False


def bell(journal: Journal) -> socket.socket:
    """The caller's to close."""
    path = journal.directory / _BELL
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        made.bind(str(path))
    except OSError as error:
        made.close()
        raise KernelError("bind of a socket in the journal", error.errno or 0, error.strerror or "") from error
    return made


# -- carrying ----------------------------------------------------------------------------------------------------------

class Carrier:
    """One end. `outward`: takes what the connection sends, where that leaves this host; None where only the other does
    that. `has_ended`: nothing will be sent for the connection any more; told for how long nothing was carried. `bell`:
    who rings there is answered once all that was sent before has left the other host."""

    def __init__(self, wire: Wire, channel: Channel, flow: Flow, outward: Callable[[bytes], None] | None,
                 has_ended: Callable[[float], bool], bell: socket.socket | None = None) -> None:
        self._wire, self._channel, self._outward, self._has_ended = wire, channel, outward, has_ended
        self._version = flow.ip_version
        self._bell = bell
        self._rung: dict[int, str] = {}
        self._flushes = 0
        self._sieve = Sieve.of(flow)
        self._waiting = bytearray()
        now = time.monotonic()
        self._heard = self._spoke = self._moved = self._looked = now

    def run(self) -> None:
        """Until the connection has ended, and the other side knows. LinkError or ProtocolError where that came
        first."""
        poller = select.poll()
        if self._bell is not None:
            poller.register(self._bell, select.POLLIN)
        masks: dict[int, int] = {}
        if self._consume():
            return
        while True:
            wanted = {self._wire.reading: select.POLLIN, self._channel.fileno(): select.POLLIN}
            if len(self._waiting) >= _ROOM:
                wanted[self._channel.fileno()] = 0
            if self._waiting:
                wanted[self._wire.writing] = wanted.get(self._wire.writing, 0) | select.POLLOUT
            elif self._wire.writing != self._wire.reading:
                wanted[self._wire.writing] = 0
            if wanted != masks:
                for number, mask in wanted.items():
                    poller.register(number, mask)
                masks = wanted
            ready = dict(poller.poll(_LOOK_S * 1000))
            if ready.get(self._wire.reading, 0) & ~select.POLLOUT and self._take():
                return
            if ready.get(self._channel.fileno(), 0) & select.POLLIN:
                self._read()
            if self._bell is not None and self._bell.fileno() in ready:
                self._ring(self._bell)
            if self._waiting:
                del self._waiting[:self._wire.write_some(self._waiting)]
            if self._look():
                return

    def _ring(self, bell: socket.socket) -> None:
        with contextlib.suppress(OSError):
            _nothing, ringer = bell.recvfrom(1)
            while self._read():
                pass
            self._flushes += 1
            self._rung[self._flushes] = ringer
            self._waiting += encode(Flush(self._flushes))

    def _answer(self, number: int) -> None:
        ringer = self._rung.pop(number, None)
        if self._bell is not None and ringer is not None:
            with contextlib.suppress(OSError):  # it waits no more
                self._bell.sendto(b"", ringer)

    def _read(self) -> bool:
        """What was sent into the device goes over the link; False where nothing was."""
        found, size = [], 0
        while size < _AT_ONCE and (packet := self._channel.read()) is not None:
            if len(packet) <= _AT_ONCE and self._sieve.leaves(packet) is not None:
                found.append(packet)
                size += len(packet)
        if found:
            self._waiting += encode(Packets(b"".join(found)))
            self._moved = self._spoke = time.monotonic()
        return size > 0

    def _take(self) -> bool:
        """What came over the link; True for the word that it is over."""
        self._wire.read_available()
        self._heard = time.monotonic()
        return self._consume()

    def _consume(self) -> bool:
        while (message := self._wire.take()) is not None:
            match message:
                case Packets():
                    for packet in split(message.packets, self._version):
                        self._deliver(packet)
                case Flush():
                    self._waiting += encode(Flushed(message.number))
                case Flushed():
                    self._answer(message.number)
                case Ended():
                    return True
                case _:
                    raise ProtocolError(f"{type(message).__name__} among packets")
        return False

    def _deliver(self, packet: bytes) -> None:
        self._moved = self._heard
        leaves = self._sieve.leaves(packet)
        if leaves is False:
            self._channel.write(packet)
        elif leaves and self._outward is not None:
            self._outward(packet)

    def _look(self) -> bool:
        """True where the connection has ended; the other side was told."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return False
        self._looked = now
        if now - self._heard > _SILENCE_S:
            raise LinkError(f"nothing was heard of the other side for {_SILENCE_S:g} s")
        if not self._waiting and self._has_ended(now - self._moved):
            self._read()
            self._wire.send_raw(bytes(self._waiting) + encode(Ended()))
            return True
        if not self._waiting and now - self._spoke >= _WORD_S:
            self._waiting += encode(Packets(b""))
            self._spoke = now
        return False


@contextlib.contextmanager
def carrying(journal: Journal, claimed: int) -> Iterator[None]:
    """The block carries, by a claim, and ends well where it is over."""
    try:
        yield
        over(journal)
    finally:
        os.close(claimed)
