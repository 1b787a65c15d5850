"""What is good, bent: bytes, text, and values as JSON has them."""

from __future__ import annotations

import copy
import math
from random import Random
from typing import Any

NUMBERS = (-1, 0, 1, 2, 14, 15, 127, 128, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
           (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 31), -(1 << 63), 10 ** 30, 10 ** 400)
TEXTS = ("", "\0", " ", "/", "..", "../../etc/passwd", "-", "%s%n", "x" * 300, "\ud800", "\udcff", "\u202e", "\x1b[2J",
         "\r\n", "\x85", "0" * 16, "\uff11", "::ffff:192.0.2.1", "255.255.255.255", "fe80::1%eth0", "127.0.0.1",
         "0.0.0.0", "auto", "receiver:", "receiver:/\0", "accept:-1", "accept:1" + "0" * 50, "pid:1:2:3", "listen:0",
         "NaN", "1e999", "committed", "aborted", "[", '"', "\\")


def is_rare(rng: Random, one_in: int) -> bool:
    return rng.randrange(one_in) == 0


def odd(rng: Random) -> Any:
    """A value where another was expected."""
    match rng.randrange(8):
        case 0 | 1:
            return rng.choice(NUMBERS)
        case 2 | 3:
            return rng.choice(TEXTS)
        case 4:
            return rng.choice((None, True, False, 0.5, -0.0, 1e300, math.nan, math.inf))
        case 5:
            return rng.choice(([], {}, [[]], [0], ["x"], {"x": 1}, [None] * 50, {"local": 1, "peer": 2}))
        case 6:
            return nested(rng.choice((2, 50, 400)))
        case _:
            return rng.getrandbits(rng.choice((8, 16, 32, 64)))


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def bent_value(rng: Random, value: Any, often: int = 2) -> Any:
    """A copy with up to `often` of its parts changed, taken away, doubled, or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, often)):
        value = _bent_once(rng, value)
    return value


def _bent_once(rng: Random, value: Any) -> Any:
    if isinstance(value, dict) and value and not is_rare(rng, 16):
        name = rng.choice(list(value))
        match rng.randrange(10):
            case 0:
                del value[name]
            case 1:
                value[str(rng.choice(TEXTS))] = odd(rng)
            case 2:
                value[name] = value[rng.choice(list(value))]
            case _:
                value[name] = _bent_once(rng, value[name])
        return value
    if isinstance(value, list) and value and not is_rare(rng, 16):
        at = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                del value[at]
            case 1:
                value.insert(at, odd(rng))
            case 2:
                value.append(value[at])
            case _:
                value[at] = _bent_once(rng, value[at])
        return value
    if type(value) is int and rng.randrange(2):
        return value + rng.choice((-1, 1, 1 << 16, -(1 << 16), 1 << 32))
    if isinstance(value, str) and value and rng.randrange(2):
        return bent_text(rng, value)
    return odd(rng)


def bent_some(rng: Random, text: str, below: int) -> str:
    """`bent_text`, fewer times than `below`; perhaps not at all."""
    for _ in range(rng.randrange(below)):
        text = bent_text(rng, text)
    return text


def bent_text(rng: Random, text: str) -> str:
    at = rng.randint(0, len(text))
    other = rng.choice((str(rng.choice(TEXTS)), chr(rng.randrange(0x3000)), text[:at], str(rng.choice(NUMBERS))))
    return text[:at] + other + text[at + rng.choice((0, 0, 1, len(other))):]


def bent_bytes(rng: Random, data: bytes, often: int = 3) -> bytes:
    """Bytes set, cut off, put in, doubled; lengths and numbers set to what is likely to hurt."""
    bent = bytearray(data)
    for _ in range(rng.randint(1, often)):
        at = rng.randint(0, len(bent))
        match rng.randrange(8):
            case 0:
                del bent[at:]
            case 1:
                del bent[at:at + rng.choice((1, 2, 4, 8, 50))]
            case 2:
                bent[at:at] = rng.randbytes(rng.choice((1, 2, 4, 20)))
            case 3:
                end = min(len(bent), at + rng.choice((4, 16, 100)))
                bent[at:at] = bent[at:end]
            case 4 | 5:
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice(NUMBERS[:-2]) % (1 << 8 * width)
                bent[at:at + width] = number.to_bytes(width, rng.choice(("big", "little")))
            case _:
                if at < len(bent):
                    bent[at] ^= 1 << rng.randrange(8)
    return bytes(bent)


def cut(rng: Random, data: bytes) -> list[bytes]:
    """As a stream may deliver it."""
    places = sorted(rng.randint(0, len(data)) for _ in range(rng.choice((0, 0, 1, 3))))
    return [data[begin:end] for begin, end in zip([0, *places], [*places, len(data)], strict=True)]
