"""What a capture holds, as plain data: TCP segments and ICMP errors about them.

Sequence numbers are the 32-bit numbers of the wire; `verify.seq` unwraps them. `payload` is what was captured,
`payload_len` what the packet really carried: a snap length cuts the first, never the second.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import PurePath

from ..core.endpoint import Endpoint
from ..core.errors import TcpcpError

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR, AE = (1 << bit for bit in range(9))    # RFC 9293 3.1, RFC 3168, RFC 9768
_LETTERS = ((SYN, "S"), (FIN, "F"), (RST, "R"), (PSH, "P"), (URG, "U"), (ECE, "E"), (CWR, "W"), (AE, "e"), (ACK, "."))


class CaptureError(TcpcpError):
    """The file is not a capture, or is damaged, or does not tell what was asked of it."""


class Role(enum.StrEnum):
    """Where a capture was taken, or which host sent a packet."""

    PEER = "peer"
    ORIGIN = "origin"
    DESTINATION = "destination"
    UNKNOWN = "unknown"

    @classmethod
    def of_name(cls, name: str) -> Role:
        """The role that a file name begins with (`origin.pcap`, `peer-eth0.pcapng`), else unknown."""
        stem = PurePath(name).name.lower()
        return next((role for role in (cls.PEER, cls.ORIGIN, cls.DESTINATION) if stem.startswith(role.value)),
                    cls.UNKNOWN)


@dataclass(frozen=True, slots=True)
class Options:
    """The TCP options that the assertions need. `length` counts every option byte, padding included."""

    length: int = 0
    mss: int | None = None
    window_scale: int | None = None
    sack_permitted: bool = False
    sack: tuple[tuple[int, int], ...] = ()
    tsval: int | None = None
    tsecr: int | None = None


@dataclass(frozen=True, slots=True)
class Packet:
    """One TCP segment as captured. `tos` is the whole byte, `ecn` its low two bits; `fragment`: the first fragment of
    an IP datagram; `outgoing`: whether the capturing host sent it, where the capture format tells (LINUX_SLL)."""

    time_ns: int
    capture: str
    number: int
    ip_version: int
    src: Endpoint
    dst: Endpoint
    seq: int
    ack: int
    flags: int
    window: int
    payload: bytes = b""
    payload_len: int = 0
    options: Options = field(default_factory=Options)
    ttl: int = 64
    tos: int = 0
    df: bool = False
    ether_src: bytes | None = None
    fragment: bool = False
    outgoing: bool | None = None

    @property
    def ecn(self) -> int:
        return self.tos & 3

    @property
    def sequence_length(self) -> int:
        """SEG.LEN: payload, SYN and FIN (RFC 9293 3.4)."""
        return self.payload_len + (self.flags & SYN != 0) + (self.flags & FIN != 0)

    def __str__(self) -> str:
        letters = "".join(letter for bit, letter in _LETTERS if self.flags & bit)
        return (f"{self.capture} #{self.number} {self.src} > {self.dst} [{letters}] seq {self.seq} ack {self.ack} "
                f"win {self.window} len {self.payload_len}")


@dataclass(frozen=True, slots=True)
class IcmpError:
    """An ICMP or ICMPv6 message that quotes a TCP packet `quoted_src` > `quoted_dst`."""

    time_ns: int
    capture: str
    number: int
    ip_version: int
    kind: int
    code: int
    sender: str
    quoted_src: Endpoint
    quoted_dst: Endpoint

    def __str__(self) -> str:
        name = "ICMP" if self.ip_version == 4 else "ICMPv6"
        return (f"{self.capture} #{self.number} {name} type {self.kind} code {self.code} from {self.sender} about "
                f"{self.quoted_src} > {self.quoted_dst}")
