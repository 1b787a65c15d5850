"""What a bad network does to packets, from a seed: pure, so that a test can say beforehand what will happen.

Each direction counts its packets from 0. What becomes of packet n depends on the seed, the direction and n alone, never
on the clock: `Fates` draws the same numbers for every packet, whatever the rates are, so two networks of one seed
that differ in one rate differ in nothing else.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

#: Directions: what the servers are sent, and what the peer is sent.
IN, OUT = "in", "out"
_NEVER = -1


@dataclass(frozen=True)
class Weather:
    """Of both directions. `delay_ms`: of every packet, one way. `loss`, `duplicate`, `reorder`: shares of the packets,
    0 to 1; one that is reordered waits up to `late_ms` longer, and those behind it go by. `rate`: bytes a second that
    fit through, None for any number; what would wait for longer than `queue_ms` is dropped, as by a full queue. The
    first `spared` packets of each direction are only delayed: a handshake, say."""

    seed: int = 1
    delay_ms: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    late_ms: float = 2.0
    rate: float | None = None
    queue_ms: float = 100.0
    spared: int = 0

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in (self.loss, self.duplicate, self.reorder)):
            raise ValueError("a share of the packets is between 0 and 1")
        if min(self.delay_ms, self.late_ms, self.queue_ms) < 0 or (self.rate is not None and self.rate <= 0):
            raise ValueError("times are not negative, and some bytes a second fit through")

    def options(self) -> list[str]:
        """Of the program that makes it, `lab.relay`."""
        values = {"seed": self.seed, "delay": self.delay_ms, "loss": self.loss, "duplicate": self.duplicate,
                  "reorder": self.reorder, "late": self.late_ms, "rate": self.rate, "queue": self.queue_ms,
                  "spared": self.spared}
        return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


class Fate(NamedTuple):
    """Of one packet: how many of it arrive, and how much later than the others it does (its copy: just as late)."""

    copies: int
    late_ms: float


class Fates:
    """Of the packets of one direction, one after the other."""

    def __init__(self, weather: Weather, direction: str) -> None:
        self._weather = weather
        self._spared = weather.spared
        self._random = random.Random(f"{weather.seed}/{direction}").random

    def next(self) -> Fate:
        weather, draw = self._weather, self._random
        lost, doubled, late, how_late = draw(), draw(), draw(), draw()
        if self._spared:
            self._spared -= 1
            return Fate(1, 0.0)
        if lost < weather.loss:
            return Fate(0, 0.0)
        return Fate(1 + (doubled < weather.duplicate), how_late * weather.late_ms if late < weather.reorder else 0.0)


class Line:
    """One direction of the link: when what comes in goes out. Times in nanoseconds, of any clock."""

    def __init__(self, weather: Weather, direction: str) -> None:
        self._weather = weather
        self._fates = Fates(weather, direction)
        self._free_at = _NEVER
        self._delay_ns, self._queue_ns = int(weather.delay_ms * 1e6), int(weather.queue_ms * 1e6)
        self.seen = self.lost = self.doubled = self.late = self.overflowed = 0

    def take(self, length: int, now_ns: int) -> tuple[int, int]:
        """(how many copies, when they go out) of the next packet, of so many bytes."""
        self.seen += 1
        fate = self._fates.next()
        if not fate.copies:
            self.lost += 1
            return 0, 0
        if self._weather.rate is not None:
            begin = max(now_ns, self._free_at)
            if begin - now_ns > self._queue_ns:
                self.overflowed += 1
                return 0, 0
            self._free_at = now_ns = begin + int(length / self._weather.rate * 1e9)
        self.doubled += fate.copies > 1
        self.late += fate.late_ms > 0
        return fate.copies, now_ns + self._delay_ns + int(fate.late_ms * 1e6)

    def to_json(self) -> dict[str, int]:
        return {"seen": self.seen, "lost": self.lost, "doubled": self.doubled, "late": self.late,
                "overflowed": self.overflowed}
