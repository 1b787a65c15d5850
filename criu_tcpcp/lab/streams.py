"""Seeded byte streams that say where they are: a lost, repeated, moved or changed byte is located, not only noticed.

A stream is pseudo-random, determined by its seed, and readable at any offset. Every 64 bytes stand 8 bytes with their
own offset (little-endian, so that neighbouring stamps differ in their first bytes):

    offset 0        8                     64       72                    128
           | stamp 0 |  56 random bytes   | stamp 64 | 56 random bytes   | ...

The random bytes repeat every MiB; the stamps never do. So a block is the base block with a few bytes of each stamp
replaced, and those are written for all stamps at once, as strides of a bytearray: a GB/s in pure Python.
"""

from __future__ import annotations

import functools
import hashlib
import random
import struct
from dataclasses import dataclass

BLOCK = 1 << 20
STRIDE = 64
_STAMPS = BLOCK // STRIDE
_STAMP = struct.Struct("<Q")
_SHORT = 4096
_PROBE = 512            # bytes after a fault that must be there to tell what happened
_LOOKAHEAD = 2 * BLOCK  # how far a moved piece is followed
_SURE = 2 * STRIDE + 24  # bytes in which `_locate` finds a stamp if it can


@functools.lru_cache(maxsize=16)
def _base_block(seed: int) -> bytes:
    """The first block. It takes 15 ms, which a program that takes a connection over in the middle must not spend then:
    it makes a Stream of the same seed beforehand."""
    base = bytearray(random.Random(seed).randbytes(BLOCK))
    for byte in range(8):
        # The lowest 20 bits of an offset are the place within the block; byte 2 shares its bits with the block.
        base[byte::STRIDE] = bytes(place * STRIDE >> 8 * byte & 0xFF for place in range(_STAMPS))
    return bytes(base)


class Stream:
    """The stream of one seed. `read` is a pure function of seed, offset and length; the last blocks are kept."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._base = _base_block(seed)
        self._third = self._base[2::STRIDE]
        self._blocks: dict[int, bytes] = {}

    def _block(self, index: int) -> bytes:
        found = self._blocks.get(index)
        if found is not None:
            return found
        block = bytearray(self._base)
        start = index * BLOCK
        if shared := start >> 16 & 0xFF:
            block[2::STRIDE] = self._third.translate(bytes((value | shared) & 0xFF for value in range(256)))
        for byte in range(3, 8):
            if value := start >> 8 * byte & 0xFF:
                block[byte::STRIDE] = bytes((value,)) * _STAMPS
        if len(self._blocks) >= 4:
            del self._blocks[next(iter(self._blocks))]
        self._blocks[index] = made = bytes(block)
        return made

    def _short(self, start: int, inside: int, length: int) -> bytes:
        """A few bytes, without making the block that they are in."""
        first = inside - inside % STRIDE
        piece = bytearray(self._base[first:inside + length])
        for place in range(0, len(piece), STRIDE):
            stamp = _STAMP.pack(start + first + place)
            piece[place:place + 8] = stamp[:len(piece) - place]
        return bytes(piece[inside - first:])

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`."""
        if offset < 0 or length < 0:
            raise ValueError(f"no bytes at {offset}, {length} long")
        index, inside = divmod(offset, BLOCK)
        if length <= _SHORT and inside + length <= BLOCK and index not in self._blocks:
            return self._short(index * BLOCK, inside, length)
        if inside + length <= BLOCK:
            return self._block(index)[inside:inside + length]
        parts = []
        while length:
            part = self._block(index)[inside:inside + length]
            parts.append(part)
            length -= len(part)
            index, inside = index + 1, 0
        return b"".join(parts)

    def sha256(self, length: int) -> str:
        """Digest of the first `length` bytes."""
        digest = hashlib.sha256()
        for offset in range(0, length, BLOCK):
            digest.update(self.read(offset, min(BLOCK, length - offset)))
        return digest.hexdigest()


@dataclass(frozen=True)
class Fault:
    """The first difference. `offset` is that of the first wrong byte. `kind`:

    - `changed`: `length` bytes from there on differ (the last wrong one included), the stream then goes on in place;
    - `lost`: `length` bytes are missing, the stream goes on behind them; at the end: the stream is short;
    - `duplicated`: bytes from `length` bytes earlier come again;
    - `reordered`: bytes from `length` bytes further come first, the expected ones after them;
    - `surplus`: `length` bytes come after the end;
    - `unknown`: none of these; no stamp nearby belongs to the stream."""

    kind: str
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.kind}: {self.length} bytes at stream offset {self.offset}"


class Checker:
    """Fed with what arrived, in any pieces; knows the first fault. `offset` counts the bytes fed, from `offset` on.

    After a difference the bytes are kept, until enough are there to tell what it is (`fault`) or `finish` says that no
    more will come; `wrong` is true from the first wrong byte on."""

    def __init__(self, seed: int, *, offset: int = 0, sha256: bool = False) -> None:
        self._stream = Stream(seed)
        self.offset = offset
        self.fault: Fault | None = None
        self._wrong_at: int | None = None
        self._tail = bytearray()
        self._enough = _PROBE
        self._digest = hashlib.sha256() if sha256 else None

    @property
    def wrong(self) -> bool:
        return self._wrong_at is not None

    @property
    def sha256(self) -> str | None:
        return self._digest.hexdigest() if self._digest is not None else None

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Check the next bytes."""
        if self._digest is not None:
            self._digest.update(data)
        start, self.offset = self.offset, self.offset + len(data)
        if self.fault is not None:
            return
        if self._wrong_at is None:
            expected = self._stream.read(start, len(data))
            if data == expected:
                return
            place = _first_difference(memoryview(data), memoryview(expected))
            self._wrong_at = start + place
            data = memoryview(data)[place:]
        self._tail += data
        if len(self._tail) >= self._enough:
            self.fault = self._diagnose(final=False)
            self._enough *= 2

    def finish(self, length: int | None = None) -> Fault | None:
        """No more bytes will come; `length` is the stream's, if it is known. Return the first fault, or None."""
        if self.fault is None and self._wrong_at is not None:
            self.fault = self._diagnose(final=True)
        if length is not None and self.offset != length and (self.fault is None or self.fault.offset >= length):
            kind = "lost" if self.offset < length else "surplus"
            self.fault = Fault(kind, min(self.offset, length), abs(self.offset - length))
        return self.fault

    def _diagnose(self, final: bool) -> Fault | None:
        """What happened at `_wrong_at`; None if more bytes are needed for that."""
        at, tail = self._wrong_at, bytes(self._tail)
        assert at is not None
        expected = self._stream.read(at, min(len(tail), _PROBE))
        resumed = max((i for i in range(len(expected)) if tail[i] != expected[i]), default=0) + 1
        found = self._locate(tail)
        if found is None or found == at:
            in_place = (found == at or resumed < len(expected) - STRIDE
                        or (final and (resumed <= len(expected) // 2 or len(expected) <= STRIDE)))
            return Fault("changed" if in_place else "unknown", at, resumed)
        if found < at:
            return Fault("duplicated", at, at - found)
        run = self._run(tail, found)
        if run >= len(tail) - _SURE and not final and len(tail) < _LOOKAHEAD:
            return None         # nothing but the later bytes so far, or too little behind them to tell what it is
        if run < len(tail) and self._follows(tail[run:], at, at + STRIDE):
            return Fault("reordered", at, found - at)
        return Fault("lost", at, found - at)

    def _locate(self, tail: bytes) -> int | None:
        """The stream offset of tail[0], from the first stamp that stands where the stream has it."""
        for place in range(min(len(tail) - 8, 2 * STRIDE) + 1):
            stamp = _STAMP.unpack_from(tail, place)[0]
            if stamp % STRIDE == 0 and stamp >= place and stamp >> 56 == 0:
                length = min(24, len(tail) - place)        # the stamp, and 16 bytes to be sure
                if tail[place:place + length] == self._stream.read(stamp, length):
                    return int(stamp) - place
        return None

    def _run(self, tail: bytes, offset: int) -> int:
        """How many bytes of `tail` are the stream's from `offset` on (the first few may agree by chance only)."""
        expected = self._stream.read(offset, len(tail))
        if tail == expected:
            return len(tail)
        return _first_difference(memoryview(tail), memoryview(expected))

    def _follows(self, rest: bytes, low: int, high: int) -> bool:
        """Do the bytes of `rest` come from before `high`, not before `low` - 8 (bytes may agree by chance)?"""
        place = self._locate(rest)
        return place is not None and low - 8 <= place < high


def _first_difference(one: memoryview, two: memoryview) -> int:
    """Index of the first byte that differs, by halves: comparing is memcmp, a loop over bytes is not."""
    low, high = 0, min(len(one), len(two))
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle
    return low
