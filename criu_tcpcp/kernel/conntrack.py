"""Whether connection tracking would let a connection by whose beginning it has not seen (net/netfilter)."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

_SETTINGS = Path("/proc/sys/net/netfilter")
_DISCARD = 9  # any port will do (RFC 863): nothing listens


def refuses_the_middle() -> bool:
    """In the calling thread's network namespace: such packets are invalid, whatever nf_conntrack_tcp_be_liberal says
    (nf_conntrack_proto_tcp.c, tcp_new), and a firewall drops what is invalid."""
    return _read("nf_conntrack_tcp_loose") == 0 and _is_at_work()


def _is_at_work() -> bool:
    """It is loaded on many hosts, and works only where a rule has asked for it: then it knows at least of a datagram
    that is sent here."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.sendto(b"", ("127.0.0.1", _DISCARD))
    return _read("nf_conntrack_count") != 0


def _read(name: str) -> int | None:
    """None where the kernel has none of it."""
    try:
        return int((_SETTINGS / name).read_text())
    except (OSError, ValueError):
        return None
