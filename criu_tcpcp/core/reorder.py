"""The peer's segments in the order in which it sent them, where they come by two ways for an instant.

Pure: numbers in, numbers out. A segment that continues what came before goes on at once, one that is ahead of it waits
for what is missing. A segment that repeats something goes on at once as well: nothing is missing before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

from . import tcp


class Order(Protocol):
    """Packet `number` has come: the numbers of those that go on now, in their order. `waits`: something is missing.
    `give_up`: it does not come, and all go on. `needs_word`: the packets themselves do not show that nothing is missing
    any more; the old owner's word does, or time."""

    needs_word: ClassVar[bool]

    @property
    def waits(self) -> bool: ...
    def came(self, number: int, packet: bytes) -> list[int]: ...
    def give_up(self) -> list[int]: ...


class Reorder:
    """`next_sequence`: what the receiver expects next (RCV.NXT, RFC 9293 3.3.1)."""

    def __init__(self, next_sequence: int) -> None:
        self._next = next_sequence
        self._waiting: dict[int, tuple[int, int]] = {}

    @property
    def waits(self) -> bool:
        """Something is missing."""
        return bool(self._waiting)

    def came(self, number: int, sequence: int, length: int) -> list[int]:
        """Segment `number` has come, of `length` bytes from `sequence` on (a SYN and a FIN are one each). Returns the
        numbers of those that go on now, in their order."""
        self._waiting[number] = (sequence, length)
        return self._go(lambda ahead: ahead <= 0)

    def give_up(self) -> list[int]:
        """What is missing does not come: all go on, in their order."""
        return self._go(lambda ahead: True)

    def _go(self, may: Callable[[int], bool]) -> list[int]:
        """The sort is stable: of two acknowledgements with one sequence number, the one that came first goes first."""
        gone = []
        for number, (sequence, length) in sorted(self._waiting.items(), key=lambda item: self._ahead(item[1][0])):
            if not may(self._ahead(sequence)):
                break
            gone.append(number)
            del self._waiting[number]
            if self._ahead(tcp.add(sequence, length)) > 0:
                self._next = tcp.add(sequence, length)
        return gone

    def _ahead(self, sequence: int) -> int:
        return tcp.distance(sequence, self._next)


class SegmentOrder:
    """`Reorder` of TCP segments; `extent` tells the sequence number and the length of a packet."""

    needs_word: ClassVar[bool] = False

    def __init__(self, next_sequence: int, extent: Callable[[bytes], tuple[int, int]]) -> None:
        self._order, self._extent = Reorder(next_sequence), extent

    @property
    def waits(self) -> bool:
        return self._order.waits

    def came(self, number: int, packet: bytes) -> list[int]:
        return self._order.came(number, *self._extent(packet))

    def give_up(self) -> list[int]:
        return self._order.give_up()


class WayOrder:
    """Of packets without numbers: those that come by the old owner come first. They have gone one hop more than those
    that come directly, and `hops` tells how many a packet has left. As long as all have gone as many, it is not known
    which they are: they wait until `give_up`, as those do that have the most left."""

    needs_word: ClassVar[bool] = True

    def __init__(self, hops: Callable[[bytes], int]) -> None:
        self._hops = hops
        self._most = 0
        self._waiting: list[tuple[int, int]] = []

    @property
    def waits(self) -> bool:
        return bool(self._waiting)

    def came(self, number: int, packet: bytes) -> list[int]:
        hops = self._hops(packet)
        self._most = max(self._most, hops)
        self._waiting.append((number, hops))
        gone = [number for number, hops in self._waiting if hops < self._most]
        self._waiting = [one for one in self._waiting if one[1] == self._most]
        return gone

    def give_up(self) -> list[int]:
        gone = [number for number, _hops in self._waiting]
        self._waiting = []
        return gone
