"""What is read of a held connection, and the proof that it is all of it.

`probe` learns ts_recent from a segment that the socket is made to send; `read` takes everything, behind the silence;
`verify` shows afterwards that nothing was left below and nothing moved. `saved` and `parts_of` are the form in which
the journal keeps it, for a recovery that must send the very message again.
"""

from __future__ import annotations

import abc
import time
from dataclasses import replace

from ..core import datagramimage, tcp
from ..core.endpoint import Flow, Protocol
from ..core.errors import ProtocolError, Refused
from ..core.image import Image, encode
from ..core.state import MAX_CARRIED, NOTHING_LEARNT, ConnectionState
from ..kernel import datagrams, repair, tcpinfo
from ..kernel.rawpacket import Injector
from ..kernel.rules import MARK
from ..kernel.tap import Sniffer
from ..kernel.timestamps import learn_ts_recent, pay_acknowledgement
from ..rehearsal import rehearse, warm_up
from .process import OriginProcess

_BELOW_EMPTY_TIMEOUT_S = 0.2
_PROBE_TIMEOUT_S = 0.05
_LOOK_AGAIN_S = 0.0002


class Extraction(abc.ABC):
    """Of one connection of the process; made before the freeze, since its sockets take time to make."""

    def __init__(self, program: OriginProcess, flow: Flow, inode: int, *, path_stays: bool = True,
                 outside: Flow | None = None) -> None:
        """`path_stays`: what the socket has learnt of the path to the peer is of use at the destination. `outside`:
        what the peer knows the connection as, where that is something else."""
        self._program, self._flow, self._inode, self._path_stays = program, flow, inode, path_stays
        self._passed_as = outside or flow
        self._image: Image | None = None
        self._rehearsed = rehearse(flow.ip_version, flow.protocol)

    def warm_up(self) -> None:
        """Just before it counts, on what the rehearsal read."""
        warm_up(self._rehearsed, self._flow.protocol)

    @abc.abstractmethod
    def probe(self) -> None:
        """Before the silence."""

    @abc.abstractmethod
    def read(self, beside: int) -> tuple[bytes, ...]:
        """Behind the silence: everything. Refused where it is more than a pass carries, together with the bytes
        `beside` it. Returns the bytes that wait, and those that were not acknowledged."""

    @abc.abstractmethod
    def verify(self) -> None:
        """Nothing of ours is below any more, and nothing moved since it was read."""

    def _fits(self, carried: int, beside: int) -> None:
        if carried + beside > MAX_CARRIED:
            raise Refused(f"the queues and the application's state are over {MAX_CARRIED >> 20} MiB together")

    @property
    def image(self) -> Image:
        if self._image is None:
            raise Refused("the connection was not read")
        return self._image

    def saved(self, app_state: bytes) -> bytes:
        """For the journal: the image's parts and the application's state, each behind its length."""
        image = self.image
        return b"".join(len(part).to_bytes(8, "big") + part
                        for part in (image.inet_sk, image.tcp_stream, image.extras, app_state))

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of what it holds."""


def extraction_of(program: OriginProcess, flow: Flow, inode: int, *, path_stays: bool = True,
                  outside: Flow | None = None) -> Extraction:
    kinds: dict[Protocol, type[Extraction]] = {Protocol.TCP: SegmentExtraction, Protocol.UDP: DatagramExtraction}
    return kinds[flow.protocol](program, flow, inode, path_stays=path_stays, outside=outside)


class DatagramExtraction(Extraction):
    """Of a UDP socket: what waits is all there is."""

    def __init__(self, program: OriginProcess, flow: Flow, inode: int, *, path_stays: bool = True,
                 outside: Flow | None = None) -> None:
        super().__init__(program, flow, inode, path_stays=path_stays, outside=outside)
        self._memory = 0

    def probe(self) -> None:
        """There is nothing to learn."""

    def read(self, beside: int) -> tuple[bytes, ...]:
        sock, options = self._program.need_socket(), self._program.options
        self._memory = datagrams.queue_memory(sock)
        state = datagrams.read_state(sock, options, self._program.is_nonblocking)
        self._fits(state.carried_bytes, beside)
        self._image = datagramimage.encode(replace(state, flow=self._passed_as), self._inode)
        return ()  # none of it is TLS

    def verify(self) -> None:
        sock = self._program.need_socket()
        if datagrams.has_corked(sock):
            raise Refused("datagrams of the connection are stuck in this host's output queues")
        if datagrams.has_error(sock) or datagrams.queue_memory(sock) != self._memory:
            raise Refused("the connection moved while it was being passed")

    def close(self) -> None:
        """It holds nothing."""


class SegmentExtraction(Extraction):
    """Of a TCP socket."""

    def __init__(self, program: OriginProcess, flow: Flow, inode: int, *, path_stays: bool = True,
                 outside: Flow | None = None) -> None:
        super().__init__(program, flow, inode, path_stays=path_stays, outside=outside)
        self._sniffer: Sniffer | None = None
        self._injector = Injector(flow.ip_version, MARK)
        self._ts_recent: int | None = None
        self._state: ConnectionState | None = None
        if tcpinfo.read(program.need_socket()).options & tcp.OPT_TIMESTAMPS:
            self._sniffer = Sniffer(flow)

    def probe(self) -> None:
        sock = self._program.need_socket()
        if self._sniffer is not None:
            self._ts_recent = learn_ts_recent(sock, self._flow, self._sniffer, self._injector, _PROBE_TIMEOUT_S)
        else:
            pay_acknowledgement(sock, self._flow, self._injector)

    def read(self, beside: int) -> tuple[bytes, ...]:
        """What the kernel still sent by its timers would be unsent in the state, and the destination takes no
        acknowledgement of what it has not sent. What it tries to send now is refused, and stays unsent
        (net/ipv4/tcp_output.c, tcp_write_xmit)."""
        stamps = self._sniffer.newest() if self._sniffer is not None else None
        state = repair.read_state(self._program.need_socket(), self._program.options, self._program.is_nonblocking,
                                  self._ts_recent, stamps[0] if stamps is not None else None)
        if not self._path_stays:
            state = replace(state, congestion=NOTHING_LEARNT)
        self._fits(len(state.outgoing) + len(state.received), beside)
        self._state, self._image = state, encode(replace(state, flow=self._passed_as), self._inode)
        return state.received, state.outgoing

    def verify(self) -> None:
        """A segment that was past the rule when that was made is counted from its birth (skb_set_owner_w), so no grace
        period is needed."""
        sock = self._program.need_socket()
        deadline = time.monotonic() + _BELOW_EMPTY_TIMEOUT_S
        while tcpinfo.bytes_below(sock):
            if time.monotonic() > deadline:
                raise Refused("segments of the connection are stuck in this host's output queues")
            time.sleep(_LOOK_AGAIN_S)
        if self._state is None or repair.sequences(sock) != (self._state.rcv_nxt, self._state.write_seq):
            raise Refused("the connection moved while it was being passed")

    def close(self) -> None:
        for part in (self._sniffer, self._injector):
            if part is not None:
                part.close()


def parts_of(saved: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """The inverse of `saved`: inet_sk, tcp_stream, extras, the application's state."""
    parts, position = [], 0
    for _ in range(4):
        begin = position + 8
        position = begin + int.from_bytes(saved[position:begin], "big")
        if position > len(saved):
            raise ProtocolError("the state in the journal is cut short")
        parts.append(saved[begin:position])
    if position != len(saved):
        raise ProtocolError("something follows the state in the journal")
    return parts[0], parts[1], parts[2], parts[3]
