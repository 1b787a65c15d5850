"""The names of what a pass refuses: one word each, for programs that read --json, beside the sentence for people.

docs/refusals.md has the same names, with what to do; a test holds it against this list.
"""

from __future__ import annotations

import enum


class Refusal(enum.StrEnum):
    """Found before anything is touched: what the origin's host sees (the first part), and what the destination's."""

    LISTENING = "listening"
    STATE = "state"
    FAST_OPEN = "fast-open"
    SHARED = "shared"
    MPTCP = "mptcp"
    UPPER_PROTOCOL = "upper-protocol"
    TCP_MD5 = "tcp-md5"
    TCP_AO = "tcp-ao"
    ECN = "ecn"
    LOOPBACK = "loopback"
    LINK_LOCAL = "link-local"
    LOCAL_PEER = "local-peer"
    NAT = "nat"
    URGENT_DATA = "urgent-data"
    ZEROCOPY = "zerocopy"
    SEND_TIMESTAMPS = "send-timestamps"
    BPF_FILTER = "bpf-filter"
    EXTENSION_HEADERS = "extension-headers"
    IO_URING = "io-uring"
    NOT_ALLOWED = "not-allowed"
    MINIMAL_TTL = "minimal-ttl"
    NO_PEER = "no-peer"
    CORKED = "corked"
    PENDING_ERROR = "pending-error"

    IN_USE = "in-use"
    CONNTRACK = "conntrack"
    USEC_TIMESTAMPS = "usec-timestamps"
    NO_ROUTE = "no-route"
