"""The bytes of a capture file -> `Capture`: the TCP segments and ICMP errors in it, and what was left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .container import frames
from .decode import Skipped, decode
from .packet import CaptureError, IcmpError, Packet, Role


@dataclass(frozen=True)
class Capture:
    """One file. `role` says where it was taken: at the peer, or at the egress of the origin or the destination."""

    name: str
    role: Role
    packets: tuple[Packet, ...]
    icmp: tuple[IcmpError, ...] = ()
    fragments: int = 0          # later IP fragments, whose TCP flow is not known
    damaged: int = 0            # frames cut short inside their headers
    untimed: int = 0            # frames whose time the file does not tell


def parse(data: bytes, name: str, role: Role | None = None) -> Capture:
    """Parse a pcap or pcapng file's bytes. Raises CaptureError, and nothing else, if they are not one, or end early.
    Without `role`, the name tells (`Role.of_name`)."""
    packets: list[Packet] = []
    errors: list[IcmpError] = []
    skipped: Counter[Skipped] = Counter()
    try:
        for frame in frames(data):
            found = decode(frame, name)
            if isinstance(found, Packet):
                packets.append(found)
            elif isinstance(found, IcmpError):
                errors.append(found)
            else:
                skipped[found] += 1
    except CaptureError as error:
        error.add_note(f"in {name}")
        raise
    return Capture(name, Role.of_name(name) if role is None else role, tuple(packets), tuple(errors),
                   skipped[Skipped.FRAGMENT], skipped[Skipped.DAMAGED], skipped[Skipped.UNTIMED])
