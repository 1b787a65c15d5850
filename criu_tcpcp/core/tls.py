"""Are these bytes of a connection TLS? (RFC 8446 5.1, RFC 5246 6.2.1)

A record is: content type (20..24), version (3.0 to 3.4), length (u16, big endian, at most 2^14 + 2048), and that many
bytes. At the head of a queue one such header is taken for TLS: four of ten million other beginnings look like it. A
queue that begins in the middle of a record has the next header within a record's length, and another behind that one,
or its end.
"""

from __future__ import annotations

import re

_HEADER = 5
_LONGEST = (1 << 14) + 2048
_BEGINNING = re.compile(rb"[\x14-\x18]\x03[\x00-\x04]")


def has_records(queue: bytes) -> bool:
    """The head of this queue is TLS. Fewer bytes than a header say nothing."""
    if _record_end(queue, 0) is not None:
        return True
    for found in _BEGINNING.finditer(queue, 1, min(len(queue), _HEADER + _LONGEST)):
        end = _record_end(queue, found.start())
        if end is not None and (end == len(queue) or _record_end(queue, end) is not None):
            return True
    return False


def _record_end(queue: bytes, at: int) -> int | None:
    """Where the record that begins here ends, be that in the queue or not; None where none begins."""
    if not _BEGINNING.match(queue, at) or len(queue) < at + _HEADER:
        return None
    length = int.from_bytes(queue[at + 3:at + 5], "big")
    return at + _HEADER + length if 0 < length <= _LONGEST else None
