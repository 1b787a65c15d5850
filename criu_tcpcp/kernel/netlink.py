"""Netlink messages for netfilter: attributes, one acknowledged request, one atomic batch.

Why not libnftables: a table with `flags owner` may be changed only through the netlink socket that made it (Linux 5.12,
nf_tables 6001a930ce03), libnftables hides that socket, and this project's owner table holds an xt target that
libnftables cannot say. So `nftables` and `nfqueue` speak netlink themselves, through this file; a set element costs
some 30 us, where a libnftables command costs 120.

Byte order: netfilter's attributes are big endian, the headers are the host's (linux/netlink.h,
linux/netfilter/nfnetlink.h).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence

from ..core.errors import KernelError
from .syscalls import failing

NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_EXT_ACK, _NETLINK_NO_ENOBUFS = 11, 5

F_REQUEST, F_ACK, F_DUMP, F_CREATE, F_EXCL = 0x1, 0x4, 0x300, 0x400, 0x200
_MSG_ERROR, _MSG_DONE = 0x2, 0x3
_NESTED = 0x8000
TYPE_MASK = 0x3FFF
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11

HEADER = struct.Struct("=IHHII")
_GENERIC = struct.Struct("=BBH")


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    length = 4 + len(payload)
    return struct.pack("=HH", length, kind) + payload + b"\0" * (-length % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(inner))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def be16(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">H", value))


def be32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value & 0xFFFFFFFF))


def be64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">Q", value))


def attributes(data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """The attributes in `data` as (kind, payload); stops at the first that does not fit."""
    view = memoryview(data)
    while len(view) >= 4:
        length, kind = struct.unpack_from("=HH", view)
        if length < 4 or length > len(view):
            return
        yield kind & TYPE_MASK, view[4:length]
        view = view[(length + 3) & ~3:]


def message(kind: int, flags: int, family: int, resource: int, payload: bytes, sequence: int) -> bytes:
    """A whole netfilter message: netlink header, generic header, attributes."""
    body = _GENERIC.pack(family, 0, socket.htons(resource)) + payload
    return HEADER.pack(HEADER.size + len(body), kind, flags | F_REQUEST, sequence, 0) + body


def messages(data: bytes) -> Iterator[tuple[int, int, memoryview]]:
    """The messages in a datagram as (kind, sequence, payload behind the netlink header)."""
    view = memoryview(data)
    while len(view) >= HEADER.size:
        length, kind, _flags, sequence, _port = HEADER.unpack_from(view)
        if length < HEADER.size or length > len(view):
            return
        yield kind, sequence, view[HEADER.size:length]
        view = view[(length + 3) & ~3:]


class NetlinkSocket:
    """A netfilter netlink socket of the network namespace that the calling thread is in."""

    def __init__(self, *, receive_buffer: int = 0) -> None:
        with failing("socket(NETLINK_NETFILTER)"):
            self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
            self.socket.bind((0, 0))
            self.socket.settimeout(5)  # the kernel answers at once; a limit all the same
            self.socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            if receive_buffer:
                self.socket.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
                self.socket.setsockopt(socket.SOL_SOCKET, 33, receive_buffer)  # SO_RCVBUFFORCE: CAP_NET_ADMIN
        self._sequence = 0

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def request(self, what: str, kind: int, flags: int, family: int, resource: int, payload: bytes) -> None:
        """One acknowledged message. KernelError names `what`."""
        sequence = self.next_sequence()
        self._send(what, message(kind, flags | F_ACK, family, resource, payload, sequence))
        self._acknowledged(what, {sequence})

    def get(self, what: str, kind: int, family: int, payload: bytes) -> bytes:
        """The one object that is asked for: its attributes. KernelError where there is none (`is_missing`)."""
        sequence = self.next_sequence()
        self._send(what, message(kind, 0, family, 0, payload, sequence))
        while True:
            for answer, number, body in messages(self._receive(what)):
                if number == sequence and answer == _MSG_ERROR:
                    _raise_unless_zero(what, body)
                elif number == sequence:
                    return bytes(body[_GENERIC.size:])

    def dump(self, what: str, kind: int, family: int, payload: bytes = b"") -> list[bytes]:
        """The answers to a dump request: attributes of each, behind the generic header."""
        sequence = self.next_sequence()
        self._send(what, message(kind, F_DUMP, family, 0, payload, sequence))
        found: list[bytes] = []
        while True:
            for answer, number, body in messages(self._receive(what)):
                if number != sequence:
                    continue
                if answer == _MSG_DONE:
                    return found
                if answer == _MSG_ERROR:
                    _raise_unless_zero(what, body)
                else:
                    found.append(bytes(body[_GENERIC.size:]))

    def batch(self, what: str, subsystem: int, parts: Sequence[tuple[int, int, int, bytes]]) -> None:
        """Apply `parts`, each (message, flags, family, attributes), in one transaction: all of them or none."""
        begin = self.next_sequence()
        out = [message(_BATCH_BEGIN, 0, 0, subsystem, b"", begin)]
        waiting: set[int] = set()
        for kind, flags, family, payload in parts:
            sequence = self.next_sequence()
            waiting.add(sequence)
            out.append(message(subsystem << 8 | kind, flags | F_ACK, family, 0, payload, sequence))
        out.append(message(_BATCH_END, 0, 0, subsystem, b"", self.next_sequence()))
        self._send(what, b"".join(out))
        self._acknowledged(what, waiting, begin)

    def _send(self, what: str, data: bytes) -> None:
        with failing(what):
            self.socket.send(data)

    def _receive(self, what: str) -> bytes:
        with failing(what):
            return self.socket.recv(1 << 17)

    def _acknowledged(self, what: str, waiting: set[int], batch: int = 0) -> None:
        failure: KernelError | None = None
        while waiting:
            for kind, sequence, body in messages(self._receive(what)):
                if kind != _MSG_ERROR or sequence not in waiting | {batch}:
                    continue
                try:
                    _raise_unless_zero(what, body)
                except KernelError as error:
                    failure = failure or error
                    if sequence == batch:  # the batch as a whole was refused (EPERM): nothing else will be answered
                        raise
                waiting.discard(sequence)
        if failure is not None:
            raise failure


def _raise_unless_zero(what: str, body: memoryview) -> None:
    number = -struct.unpack_from("=i", body)[0]
    if number:
        raise KernelError(what, number, os.strerror(number))


def is_missing(error: KernelError) -> bool:
    """What was to be removed is not there (any more)."""
    return error.errno in (errno.ENOENT, errno.ESRCH)
