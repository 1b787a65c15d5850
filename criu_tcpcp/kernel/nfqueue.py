"""A packet queue: packets that a rule sends here stay in the kernel until a verdict
(linux/netfilter/nfnetlink_queue.h).

The queue's real limit is the receive buffer of its netlink socket, not its length: what does not fit is dropped. So
the buffer is forced large, packets come unsegmented (GSO) and only their first bytes are copied; nobody asks for
FAIL_OPEN, since an overflow would then reach the old owner. When the socket is closed, or its process dies, the
kernel drops what is still queued: the peer sends that again.
"""

from __future__ import annotations

import errno
import random
import select
import struct
from collections.abc import Iterable, Iterator

from ..core.errors import KernelError
from . import netlink
from .syscalls import failing

_SUBSYSTEM = 3
_PACKET, _VERDICT, _CONFIG, _VERDICT_BATCH = 0, 1, 2, 3
_CFG_CMD, _CFG_PARAMS, _CFG_MAXLEN, _CFG_MASK, _CFG_FLAGS = 1, 2, 3, 4, 5
_BIND, _COPY_PACKET, _FLAG_GSO = 1, 2, 4
_ATTR_HEADER, _ATTR_VERDICT, _ATTR_PAYLOAD = 1, 2, 10
_COPY_BYTES = 120
_LENGTH = 65536
_BUFFER_BYTES = 64 << 20
_LOWEST, _HIGHEST = 0x7C00, 0xFFFF

ACCEPT, DROP = 1, 0  # linux/netfilter.h


class PacketQueue:
    """A queue number of its own in the calling thread's network namespace, and the packets that wait in it."""

    def __init__(self) -> None:
        self._netlink = netlink.NetlinkSocket(receive_buffer=_BUFFER_BYTES)
        try:
            self.number = self._bind_free_number()
            self._configure()
        except BaseException:
            self._netlink.close()
            raise
        self._netlink.socket.setblocking(False)
        self._last_id = 0
        self.waiting = 0
        self.released = 0

    def _bind_free_number(self) -> int:
        for _ in range(64):
            number = random.randint(_LOWEST, _HIGHEST)
            try:
                self._request(number, netlink.attribute(_CFG_CMD, struct.pack(">BxH", _BIND, 0)))
            except KernelError as error:
                if error.errno == errno.EBUSY:  # another program's queue
                    continue
                raise
            return number
        raise KernelError("NFQUEUE bind", errno.EBUSY, "no free queue number found")

    def _configure(self) -> None:
        self._request(self.number,
                      netlink.attribute(_CFG_PARAMS, struct.pack(">IB", _COPY_BYTES, _COPY_PACKET))
                      + netlink.be32(_CFG_MAXLEN, _LENGTH)
                      + netlink.be32(_CFG_FLAGS, _FLAG_GSO) + netlink.be32(_CFG_MASK, _FLAG_GSO))

    def _request(self, number: int, payload: bytes) -> None:
        self._netlink.request("NFQUEUE", _SUBSYSTEM << 8 | _CONFIG, 0, 0, number, payload)

    def fileno(self) -> int:
        return self._netlink.fileno()

    def close(self) -> None:
        self._netlink.close()

    def _read(self) -> Iterator[tuple[int, bytes]]:
        """(number, first bytes) of the packets that came since; never blocks."""
        while True:
            try:
                with failing("NFQUEUE read"):
                    data = self._netlink.socket.recv(1 << 17)
            except KernelError as error:
                if error.errno == errno.EAGAIN:
                    return
                raise
            for kind, _sequence, body in netlink.messages(data):
                if kind == _SUBSYSTEM << 8 | _PACKET:
                    found = dict(netlink.attributes(body[4:]))
                    self._last_id = int.from_bytes(found[_ATTR_HEADER][:4], "big")
                    self.waiting += 1
                    yield self._last_id, bytes(found.get(_ATTR_PAYLOAD, b""))

    def collect(self) -> int:
        """Take note of the packets that came since; never blocks. Returns how many wait now."""
        for _ in self._read():
            pass
        return self.waiting

    def take(self) -> list[tuple[int, bytes]]:
        """(number, its first bytes) of each packet that came since, for `let_go`; never blocks."""
        return list(self._read())

    def next_packet(self, timeout_s: float) -> bytes | None:
        """The first bytes of a packet, from its IP header on, as soon as there is one that was not seen; it, and all
        that wait with it, are dropped. None where none comes in time."""
        poller = select.poll()
        poller.register(self._netlink.socket, select.POLLIN)
        if not poller.poll(timeout_s * 1000):
            return None
        found = [packet for _number, packet in self._read()]
        self.release(DROP)
        return found[0] if found else None

    def let_go(self, numbers: Iterable[int], verdict: int = ACCEPT) -> None:
        """Give these packets the verdict, in this order."""
        for number in numbers:
            body = netlink.attribute(_ATTR_VERDICT, struct.pack(">II", verdict, number))
            with failing("NFQUEUE verdict"):
                self._netlink.socket.send(netlink.message(_SUBSYSTEM << 8 | _VERDICT, 0, 0, self.number, body,
                                                          self._netlink.next_sequence()))
            self.waiting -= 1
            self.released += 1

    def release(self, verdict: int = ACCEPT) -> int:
        """Give the verdict to every packet that has come so far, in their order. Returns how many that were."""
        count = self.collect()
        if count:
            body = netlink.attribute(_ATTR_VERDICT, struct.pack(">II", verdict, self._last_id))
            with failing("NFQUEUE verdict"):
                self._netlink.socket.send(netlink.message(_SUBSYSTEM << 8 | _VERDICT_BATCH, 0, 0, self.number, body,
                                                          self._netlink.next_sequence()))
            self.waiting = 0
            self.released += count
        return count
