"""The hypervisor's half of vhost-user, which the benchmarks play; the device's is played here, by the layout alone."""

from __future__ import annotations

import socket
import struct
import threading
from pathlib import Path

import pytest

from ways.vhostuser import BackEnd, BackEndError
from ways.virtqueue import Layout, Virtqueue

BASE = 1 << 30
SIZE, ROOM = 4, 64


class Device:
    """The other half of a split virtqueue, by the byte offsets of the specification (virtio 1.2, 2.7)."""

    def __init__(self, memory: bytearray, layout: Layout) -> None:
        self.memory, self.layout = memory, layout
        self.seen = self.returned = 0

    def offered(self) -> tuple[int, int, int, int] | None:
        """(index, offset of its buffer, length, flags) of the next descriptor that the driver offers."""
        where = self.layout.available
        if struct.unpack_from("<H", self.memory, where + 2)[0] == self.seen & 0xffff:
            return None
        index = struct.unpack_from("<H", self.memory, where + 4 + self.seen % SIZE * 2)[0]
        self.seen += 1
        address, length, flags, _next = struct.unpack_from("<QIHH", self.memory, self.layout.begin + index * 16)
        return index, address - BASE, length, flags

    def give_back(self, index: int, length: int) -> None:
        struct.pack_into("<II", self.memory, self.layout.used + 4 + self.returned % SIZE * 8, index, length)
        self.returned += 1
        struct.pack_into("<H", self.memory, self.layout.used + 2, self.returned & 0xffff)


def queue(*, writable: bool) -> tuple[Virtqueue, Device]:
    layout = Layout(4096, SIZE, ROOM)
    memory = bytearray(layout.end)
    return Virtqueue(memoryview(memory), layout, BASE, writable=writable), Device(memory, layout)


def test_what_the_driver_writes_the_device_reads_beyond_every_wrap() -> None:
    driver, device = queue(writable=False)
    for number in range(70_000):      # the indices have 16 bits
        index = driver.free()
        assert index is not None
        driver.buffer(index)[:4] = struct.pack("<I", number)
        driver.offer(4)
        found = device.offered()
        assert found is not None
        assert found[2:] == (4, 0)
        assert struct.unpack_from("<I", device.memory, found[1])[0] == number
        device.give_back(found[0], 0)
        assert driver.take() == (index, 0)
    assert device.offered() is None
    assert driver.take() is None


def test_what_the_device_writes_the_driver_reads_and_offers_again() -> None:
    driver, device = queue(writable=True)
    for _ in range(SIZE):
        driver.offer()
    assert driver.free() is None
    for number in range(3 * SIZE):
        found = device.offered()
        assert found is not None
        index, offset, length, flags = found
        assert (length, flags) == (ROOM, 2)
        device.memory[offset:offset + 2] = struct.pack("<H", number)
        device.give_back(index, 2)
        assert driver.take() == (index, 2)
        assert bytes(driver.buffer(index)[:2]) == struct.pack("<H", number)
        driver.offer()


def test_buffers_come_back_in_any_order() -> None:
    driver, device = queue(writable=False)
    for _ in range(SIZE):
        driver.offer(1)
    assert driver.free() is None
    offered = [found[0] for found in iter(device.offered, None)]
    for index in reversed(offered):
        device.give_back(index, 0)
    assert [taken[0] for taken in iter(driver.take, None)] == offered[::-1]
    assert driver.free() == offered[0]


def test_the_parts_of_a_queue_do_not_overlap() -> None:
    where = Layout(0, 256, 2048)
    parts = [(where.begin, 256 * 16), (where.available, 6 + 2 * 256), (where.used, 6 + 8 * 256),
             (where.buffers, 256 * 2048)]
    for (begin, length), (following, _) in zip(parts, [*parts[1:], (where.end, 0)], strict=True):
        assert begin + length <= following
    assert (where.available % 2, where.used % 4, where.end % 4096) == (0, 0, 0)


class Back:
    """A back end that has what it is told, gives a state away, and takes one."""

    def __init__(self, path: Path, *, features: int = 1 << 32 | 1 << 30, result: int = 0) -> None:
        self.features, self.result = features, result
        self.state = b"the device"
        self.requests: list[int] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        sock, _address = self._listener.accept()
        with sock, self._listener:
            while True:
                header, descriptors, _flags, _address = socket.recv_fds(sock, 12, 8)
                if not header:
                    return
                request, flags, size = struct.unpack("=III", header)
                payload = sock.recv(size) if size else b""
                self.requests.append(request)
                answer = self._answer(request, payload, descriptors)
                if answer is None and flags & 8:
                    answer = 0
                if answer is not None:
                    sock.sendall(struct.pack("=IIIQ", request, 5, 8, answer))
                if request == 42:
                    self._transfer(payload, descriptors[0])

    def _answer(self, request: int, payload: bytes, descriptors: list[int]) -> int | None:
        given = {1: self.features, 15: 1 << 3 | 1 << 19, 42: 1 << 8, 43: self.result}
        return given.get(request)

    def _transfer(self, payload: bytes, descriptor: int) -> None:
        if struct.unpack("=II", payload)[0] == 0:
            with open(descriptor, "wb") as stream:
                stream.write(self.state)
        else:
            with open(descriptor, "rb") as stream:
                self.state = stream.read()

    def end(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


def test_the_state_of_the_device_comes_and_goes_by_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    back = Back(path)
    front = BackEnd(str(path))
    assert front.save() == b"the device"
    front.load(b"another" * 100_000)      # more than a pipe holds
    front.close()
    back.end()
    assert back.state == b"another" * 100_000
    assert back.requests == [1, 15, 16, 3, 42, 43, 42, 43]


def test_a_back_end_that_cannot_move_its_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    back = Back(path, features=1 << 32)
    with pytest.raises(BackEndError, match="features 0x40000000 are not offered"):
        BackEnd(str(path))
    back.end()


def test_a_state_that_the_back_end_calls_bad_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    back = Back(path, result=22)
    front = BackEnd(str(path))
    with pytest.raises(BackEndError, match="CHECK_DEVICE_STATE: answer 22"):
        front.load(b"bent")
    front.close()
    back.end()
