"""The driver's half of a split virtqueue (virtio 1.2, 2.7), in memory that a vhost-user back end shares.

Indices are written and read as whole 16-bit words, in the machine's byte order: on a little-endian machine, virtio's.
Nothing orders a store before another but the processor: x86 does, and whoever kicks or is called goes through a system
call, which does everywhere.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_DESCRIPTOR = struct.Struct("<QIHH")      # address, length, flags, next
_WRITABLE = 2                             # VIRTQ_DESC_F_WRITE: the device fills it
_AVAILABLE_HEAD = 2                       # 16-bit words before the ring: flags, index
_USED_HEAD = 2
_USED_ELEMENT = 4                         # of an element, in 16-bit words: id and length, 32 bits each


@dataclass(frozen=True)
class Layout:
    """Where the parts of a queue of `size` descriptors lie, by offset into the memory; each has a buffer of `room`."""

    begin: int
    size: int
    room: int

    @property
    def available(self) -> int:
        return self.begin + _DESCRIPTOR.size * self.size

    @property
    def used(self) -> int:
        return _aligned(self.available + 2 * (_AVAILABLE_HEAD + self.size + 1), 4)

    @property
    def buffers(self) -> int:
        return _aligned(self.used + 2 * (_USED_HEAD + _USED_ELEMENT * self.size + 1), 64)

    @property
    def end(self) -> int:
        return _aligned(self.buffers + self.size * self.room, 4096)


class Virtqueue:
    """A queue in `memory`, which begins at guest address `base`. Each descriptor has its own buffer, for ever.

    `writable`: the device fills the buffers, as a network card's receive queue; else the driver does."""

    def __init__(self, memory: memoryview, layout: Layout, base: int, *, writable: bool) -> None:
        self.layout = layout
        self._memory = memory
        words = 2 * (_AVAILABLE_HEAD + layout.size)
        self._available = memory[layout.available:layout.available + words].cast("H")
        words = 2 * (_USED_HEAD + _USED_ELEMENT * layout.size)
        self._used = memory[layout.used:layout.used + words].cast("H")
        self._seen = 0        # used elements that were taken
        self._free = list(range(layout.size))
        for index in range(layout.size):
            _DESCRIPTOR.pack_into(memory, layout.begin + index * _DESCRIPTOR.size,
                                  base + layout.buffers + index * layout.room, layout.room,
                                  _WRITABLE if writable else 0, 0)

    def free(self) -> int | None:
        """A descriptor that the driver has, until it is offered; None if the device has all of them."""
        return self._free[-1] if self._free else None

    def buffer(self, index: int) -> memoryview:
        start = self.layout.buffers + index * self.layout.room
        return self._memory[start:start + self.layout.room]

    def offer(self, length: int | None = None) -> None:
        """Let the device have the descriptor that `free` named; `length`: of what the driver wrote."""
        index = self._free.pop()
        if length is not None:
            struct.pack_into("<I", self._memory, self.layout.begin + index * _DESCRIPTOR.size + 8, length)
        at = self._available[1]
        self._available[_AVAILABLE_HEAD + at % self.layout.size] = index
        self._available[1] = (at + 1) & 0xffff

    def take(self) -> tuple[int, int] | None:
        """The next descriptor that the device gave back, and how many bytes it wrote; None if there is none. The
        driver has it again: what is in its buffer is there until it is offered."""
        if self._used[1] == self._seen:
            return None
        at = _USED_HEAD + self._seen % self.layout.size * _USED_ELEMENT
        index, length = self._used[at], self._used[at + 2] | self._used[at + 3] << 16
        self._seen = (self._seen + 1) & 0xffff
        self._free.append(index)
        return index, length


def _aligned(offset: int, to: int) -> int:
    return -(-offset // to) * to
