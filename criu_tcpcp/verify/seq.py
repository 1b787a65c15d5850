"""Sequence numbers (RFC 9293 3.4): arithmetic modulo 2^32, and sets of sequence ranges.

Assertions do not compare 32-bit numbers. Each number is first *unwrapped*: replaced by the integer congruent to it that
lies nearest to a number already unwrapped. From there on, plain integers are compared, and a stream may pass through
2^32 as often as it likes. The same serves timestamps (RFC 7323 5.2), which are circular in the same way.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

MODULUS = 1 << 32
HALF = 1 << 31


def difference(a: int, b: int) -> int:
    """a - b on the circle, -2^31 .. 2^31 - 1: negative where a comes before b."""
    return (a - b + HALF) % MODULUS - HALF


def before(a: int, b: int) -> bool:
    return difference(a, b) < 0


def unwrap(reference: int | None, value: int) -> int:
    """The integer congruent to `value` nearest to `reference`; the first of a stream is placed one turn above zero, so
    that what precedes it is still positive."""
    if reference is None:
        return value + MODULUS
    return reference + difference(value, reference % MODULUS)


class RangeSet:
    """A set of integers as disjoint half-open ranges in order; adding at the end, the usual case, is O(1)."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.total = 0

    def add(self, start: int, end: int) -> int:
        """Add start..end-1; return how many of them are new."""
        if end <= start:
            return 0
        if self._ends and start > self._ends[-1]:
            self._starts.append(start)
            self._ends.append(end)
            self.total += end - start
            return end - start
        low = bisect_left(self._ends, start)      # the first range that touches start or lies after it
        high = bisect_right(self._starts, end)    # one past the last range that touches end
        known = sum(self._ends[i] - self._starts[i] for i in range(low, high))
        if low < high:
            start, end = min(start, self._starts[low]), max(end, self._ends[high - 1])
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]
        new = end - start - known
        self.total += new
        return new

    def covers(self, start: int, end: int) -> bool:
        """Is every integer of start..end-1 in the set?"""
        if end <= start:
            return True
        index = bisect_right(self._starts, start) - 1
        return index >= 0 and self._ends[index] >= end


class ByteStore:
    """The bytes seen at each sequence number, kept as disjoint pieces in order: the memory behind "a byte at one
    sequence number never differs between transmissions". Pieces are references to the captured payloads."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._pieces: list[bytes] = []

    def add(self, start: int, data: bytes) -> int | None:
        """Compare `data` with what is known at its place and keep what is not; return the first number at which
        the two differ, or None."""
        end = start + len(data)
        last = self._starts[-1] + len(self._pieces[-1]) if self._starts else start
        if start >= last:
            if data:
                self._starts.append(start)
                self._pieces.append(data)
            return None
        index = max(bisect_right(self._starts, start) - 1, 0)
        fresh: list[tuple[int, bytes]] = []
        wrong: int | None = None
        position = start
        while position < end and index < len(self._starts):
            piece_start, piece = self._starts[index], self._pieces[index]
            piece_end = piece_start + len(piece)
            if piece_end <= position:
                index += 1
                continue
            if position < piece_start:
                stop = min(piece_start, end)
                fresh.append((position, data[position - start:stop - start]))
                position = stop
                continue
            stop = min(piece_end, end)
            ours, theirs = data[position - start:stop - start], piece[position - piece_start:stop - piece_start]
            if ours != theirs and wrong is None:
                wrong = position + next(i for i, (x, y) in enumerate(zip(ours, theirs, strict=True)) if x != y)
            position = stop
            index += 1
        if position < end:
            fresh.append((position, data[position - start:]))
        for place, piece in fresh:
            at = bisect_left(self._starts, place)
            self._starts.insert(at, place)
            self._pieces.insert(at, piece)
        return wrong
