"""Captures and the wire assertions: proof, from packets alone, that the peer could not tell. Imports `core` only.

    bytes -> container (pcap, pcapng) -> decode (link, IP, TCP) -> capture -> verdict.verify -> Verdict

Pure: nothing here opens a file, reads a clock or logs. `builder` goes the other way (packets -> capture bytes) and
serves tests that need a doctored capture.
"""

from .application import PeerRecord, check_application
from .capture import Capture, parse
from .connections import Connection, find_connections, narrowed
from .counters import check_counters, parse_netstat
from .judgement import Expectations, Turn, Violation
from .packet import CaptureError, IcmpError, Packet, Role
from .verdict import Verdict, verify
from .wire import Negotiated

__all__ = [
    "Capture", "CaptureError", "Connection", "Expectations", "IcmpError", "Negotiated", "Packet", "PeerRecord", "Role",
    "Turn", "Verdict", "Violation", "check_application", "check_counters", "find_connections", "narrowed", "parse",
    "parse_netstat", "verify",
]
