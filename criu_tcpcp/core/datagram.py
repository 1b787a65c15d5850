"""The state of a connected UDP socket: everything the kernel knows of the endpoint that must move.

    receive queue                       send queue
    | datagram | datagram | ... |       nothing: a datagram that was sent is the network's. What a program has begun and
    what the program has not read       not finished (UDP_CORK, MSG_MORE) cannot be read, and is refused

Each datagram keeps its boundaries, and what its packet said that a program may ask for. A `DatagramState` validates
itself when made, as `ConnectionState` does, and for the same reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .endpoint import Flow, Protocol
from .options import OptionValue
from .state import fitted_options

#: Bytes of payload: what the lengths in the headers can say (RFC 768, RFC 791, RFC 8200; no jumbograms).
LONGEST = {4: 65535 - 20 - 8, 6: 65535 - 8}
MOST = 1 << 16  # datagrams; an empty one costs the kernel some 700 bytes, and the queue's limit is in bytes
_OVERHEAD = 1024  # bytes that a queued datagram costs beside its payload, at least


@dataclass(frozen=True)
class Datagram:
    """One that waits to be read. `hops`: its TTL, or hop limit; `traffic_class`: TOS, or traffic class."""

    payload: bytes = field(repr=False)
    hops: int = 64
    traffic_class: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.hops < 256:
            raise ValueError(f"a datagram with {self.hops} hops left cannot have arrived")
        if not 0 <= self.traffic_class < 256:
            raise ValueError(f"{self.traffic_class} is no traffic class")

    @property
    def cost(self) -> int:
        """What it takes of the receive buffer, at most: skbs are rounded up to pages, and to powers of two."""
        return 2 * (len(self.payload) + _OVERHEAD)


@dataclass(frozen=True)
class DatagramState:
    """See the module's drawing."""

    flow: Flow
    datagrams: tuple[Datagram, ...]
    options: Mapping[str, OptionValue]
    nonblocking: bool = False

    def __post_init__(self) -> None:
        longest = LONGEST[self.flow.ip_version]
        checks = [(self.flow.protocol is Protocol.UDP, f"{self.flow} is not UDP"),
                  (len(self.datagrams) <= MOST, f"more than {MOST} datagrams"),
                  (all(len(one.payload) <= longest for one in self.datagrams),
                   f"a datagram of more than {longest} bytes")]
        for holds, problem in checks:
            if not holds:
                raise ValueError(problem)

    @property
    def carried_bytes(self) -> int:
        return sum(len(one.payload) for one in self.datagrams)


def fitted(state: DatagramState, own: Mapping[str, OptionValue], ipv6_socket: bool) -> DatagramState:
    """As core.state.fitted: the state for a socket that a program has set up already."""
    flow = replace(state.flow, mapped=ipv6_socket and state.flow.ip_version == 4)
    return replace(state, flow=flow, options=fitted_options(state.options, own))
