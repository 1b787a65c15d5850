"""The hypervisor's end of a vhost-user connection (QEMU's docs/interop/vhost-user.rst), as far as a network card that
is moved needs it: two queues, one region of memory, and the state of the device out of one back end and into another.
"""

from __future__ import annotations

import array
import os
import socket
import struct
import time
from dataclasses import dataclass
from enum import IntEnum

from .virtqueue import Virtqueue

_HEADER = struct.Struct("=III")           # request, flags, size of the payload
_VERSION, _REPLY, _NEEDS_REPLY = 1, 1 << 2, 1 << 3
_STATE = struct.Struct("=II")             # of a queue: its number, a value
_ADDRESSES = struct.Struct("=IIQQQQ")     # queue, flags, descriptors, used, available, address for the log
_REGION = struct.Struct("=IIQQQQ")        # number of regions, padding; guest address, size, user address, offset
_U64 = struct.Struct("=Q")

PROTOCOL_FEATURES = 1 << 30               # VHOST_USER_F_PROTOCOL_FEATURES
VERSION_1 = 1 << 32                       # VIRTIO_F_VERSION_1
REPLY_ACK, DEVICE_STATE = 1 << 3, 1 << 19  # VHOST_USER_PROTOCOL_F_...
RECEIVE, TRANSMIT = 0, 1                  # the queues of a card with one pair of them
_SAVE, _LOAD = 0, 1
_STOPPED = 0                              # the only phase in which the state moves
_PATIENCE_S = 10.0
_NO_DESCRIPTOR = 1 << 8                   # in the answer: the back end has no descriptor of its own for the state


class Request(IntEnum):
    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    SET_VRING_ENABLE = 18
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackEndError(Exception):
    """What the back end answered, or lacks."""


@dataclass(frozen=True)
class Shared:
    """What the guest has, wherever it runs: its memory, and the queues of its network card in it."""

    memory: int                           # a descriptor that can be mapped
    size: int
    base: int                             # its guest address; the same number stands for the hypervisor's own
    queues: tuple[Virtqueue, Virtqueue]
    kicks: tuple[int, int]                # eventfd(2) of each queue: there is something for the device
    calls: tuple[int, int]                # for the driver


class BackEnd:
    """A back end that listens on `path`, as a hypervisor has it whose guest does not run yet."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _connect(self._socket, path)
            self._features = _all_of(VERSION_1 | PROTOCOL_FEATURES, self._ask(Request.GET_FEATURES), "features")
            protocol = _all_of(REPLY_ACK | DEVICE_STATE, self._ask(Request.GET_PROTOCOL_FEATURES), "protocol features")
            self._tell(Request.SET_PROTOCOL_FEATURES, _U64.pack(protocol))
            self._tell(Request.SET_OWNER)
        except BaseException:
            self.close()
            raise

    def start(self, shared: Shared, bases: tuple[int, int]) -> None:
        """Let the device have the guest's queues; it goes on at `bases`."""
        self._tell(Request.SET_FEATURES, _U64.pack(self._features))
        self._tell(Request.SET_MEM_TABLE, _REGION.pack(1, 0, shared.base, shared.size, shared.base, 0), shared.memory)
        for number, queue in enumerate(shared.queues):
            where = queue.layout
            self._tell(Request.SET_VRING_NUM, _STATE.pack(number, where.size))
            self._tell(Request.SET_VRING_BASE, _STATE.pack(number, bases[number]))
            self._tell(Request.SET_VRING_ADDR, _ADDRESSES.pack(
                number, 0, shared.base + where.begin, shared.base + where.used, shared.base + where.available, 0))
            self._tell(Request.SET_VRING_CALL, _U64.pack(number), shared.calls[number])
            self._tell(Request.SET_VRING_KICK, _U64.pack(number), shared.kicks[number])
        for number in (RECEIVE, TRANSMIT):
            self._confirmed(Request.SET_VRING_ENABLE, _STATE.pack(number, 1))

    def stop(self) -> tuple[int, int]:
        """Take the queues back; where the next back end is to go on."""
        for number in (RECEIVE, TRANSMIT):
            self._confirmed(Request.SET_VRING_ENABLE, _STATE.pack(number, 0))
        receive, transmit = (
            _STATE.unpack(self._exchange(Request.GET_VRING_BASE, _STATE.pack(number, 0)))[1]
            for number in (RECEIVE, TRANSMIT))
        return receive, transmit

    def save(self) -> bytes:
        """The state of the device, which is stopped."""
        ours, theirs = os.pipe()
        try:
            self._transfer(_SAVE, theirs)
        finally:
            os.close(theirs)
        with open(ours, "rb") as stream:
            state = stream.read()
        self._check()
        return state

    def load(self, state: bytes) -> None:
        """Make it the state of the device, which is not started."""
        theirs, ours = os.pipe()
        with open(ours, "wb") as stream:
            try:
                self._transfer(_LOAD, theirs)
            finally:
                os.close(theirs)
            stream.write(state)
        self._check()

    def _transfer(self, direction: int, descriptor: int) -> None:
        answer = self._exchange(Request.SET_DEVICE_STATE_FD, _STATE.pack(direction, _STOPPED), descriptor)
        if _U64.unpack(answer)[0] != _NO_DESCRIPTOR:
            raise BackEndError(f"SET_DEVICE_STATE_FD: answer {answer.hex()}")

    def _check(self) -> None:
        result = self._ask(Request.CHECK_DEVICE_STATE)
        if result:
            raise BackEndError(f"CHECK_DEVICE_STATE: answer {result}")

    def close(self) -> None:
        self._socket.close()

    # -- messages ------------------------------------------------------------------------------------------------------

    def _ask(self, request: Request) -> int:
        value: int = _U64.unpack(self._exchange(request))[0]
        return value

    def _confirmed(self, request: Request, payload: bytes) -> None:
        """Until the back end has done it, and all that was told before."""
        self._send(request, payload, flags=_NEEDS_REPLY)
        answer = _U64.unpack(self._answer(request))[0]
        if answer:
            raise BackEndError(f"{request.name}: answer {answer}")

    def _exchange(self, request: Request, payload: bytes = b"", descriptor: int | None = None) -> bytes:
        self._send(request, payload, descriptor)
        return self._answer(request)

    def _tell(self, request: Request, payload: bytes = b"", descriptor: int | None = None) -> None:
        self._send(request, payload, descriptor)

    def _send(self, request: Request, payload: bytes, descriptor: int | None = None, flags: int = 0) -> None:
        message = _HEADER.pack(request, _VERSION | flags, len(payload)) + payload
        rights = [] if descriptor is None else [
            (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        self._socket.sendmsg([message], rights)

    def _answer(self, request: Request) -> bytes:
        number, flags, size = _HEADER.unpack(self._exactly(_HEADER.size))
        if number != request or not flags & _REPLY:
            raise BackEndError(f"{request.name}: answered with request {number}, flags {flags:#x}")
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = self._socket.recv(size, socket.MSG_WAITALL)
        if len(data) != size:
            raise BackEndError("the back end has closed the connection")
        return data


def _connect(sock: socket.socket, path: str) -> None:
    """The path is there before its owner listens."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)
        else:
            return


def _all_of(wanted: int, offered: int, what: str) -> int:
    if wanted & ~offered:
        raise BackEndError(f"{what} {wanted & ~offered:#x} are not offered")
    return wanted
