"""What captures of a UDP connection show: a clean pass, and each lie about one."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from criu_tcpcp.core.endpoint import Endpoint, Flow, Protocol
from criu_tcpcp.kernel.rawdatagram import build_datagram, build_refusal
from criu_tcpcp.verify.datagrams import judge_datagrams, parse_datagrams
from criu_tcpcp.verify.packet import Role

FLOW = Flow(Endpoint(ipaddress.ip_address("192.0.2.1"), 9000), Endpoint(ipaddress.ip_address("198.51.100.2"), 40000),
            protocol=Protocol.UDP)


@dataclass(frozen=True)
class Seen:
    time: int
    role: Role
    data: bytes


def said(time: int, *roles: Role, from_peer: bool, number: int, hops: int = 64, traffic_class: int = 0) -> list[Seen]:
    ends = (FLOW.peer, FLOW.local) if from_peer else (FLOW.local, FLOW.peer)
    packet = build_datagram(*ends, b"%04d" % number, hops=hops, traffic_class=traffic_class)[0]
    return [Seen(time, role, packet) for role in roles]


def clean() -> list[Seen]:
    """Five questions and answers; the third is asked during the pass, and sent on."""
    seen: list[Seen] = []
    for number in range(5):
        owner = Role.ORIGIN if number < 2 else Role.DESTINATION
        seen += said(10 * number, Role.PEER, Role.ORIGIN, from_peer=True, number=number)
        if owner is Role.DESTINATION:
            seen += said(10 * number + 1, Role.ORIGIN, Role.DESTINATION, from_peer=True, number=number, hops=63)
        seen += said(10 * number + 2, owner, Role.PEER, from_peer=False, number=number)
    return seen


def judged(seen: list[Seen], passes: int = 1) -> list[str]:
    captures = []
    for role in (Role.PEER, Role.ORIGIN, Role.DESTINATION):
        data = struct.pack("=IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 65535, 101)
        for one in sorted((one for one in seen if one.role is role), key=lambda one: one.time):
            data += struct.pack("=IIII", 0, one.time, len(one.data), len(one.data)) + one.data
        captures.append(parse_datagrams(data, role, FLOW))
    return judge_datagrams(captures, FLOW, passes)


def test_a_clean_pass_is_clean() -> None:
    assert judged(clean()) == []


@pytest.mark.parametrize(("lie", "words"), [
    (lambda seen: [*seen, Seen(99, Role.PEER, build_refusal(replace(FLOW, local=FLOW.peer, peer=FLOW.local)))], "1: "),
    (lambda seen: seen + said(35, Role.ORIGIN, from_peer=False, number=9), "2: "),
    (lambda seen: seen + said(45, Role.DESTINATION, from_peer=False, number=4), "3: twice"),
    (lambda seen: seen + said(45, Role.DESTINATION, from_peer=True, number=3, hops=63), "3: twice"),
    (lambda seen: [replace(one, time=39) if (one.time, one.role) == (21, Role.DESTINATION) else one for one in seen],
     "3: the peer's datagram 2"),
    (lambda seen: seen + said(50, Role.PEER, from_peer=False, number=9, hops=62), "4: TTL"),
    (lambda seen: seen + said(50, Role.PEER, from_peer=False, number=9, traffic_class=8), "4: TOS")],
    ids=["refused", "old owner", "answer twice", "question twice", "overtaken", "ttl", "tos"])
def test_a_lie_is_seen(lie: Callable[[list[Seen]], list[Seen]], words: str) -> None:
    found = judged(lie(clean()))
    assert found
    assert all(one.startswith(words) for one in found), found


def test_one_hop_more_is_none() -> None:
    assert judged(clean() + said(50, Role.PEER, from_peer=False, number=9, hops=63)) == []


def test_what_is_no_datagram_is_passed_over() -> None:
    garbage = [Seen(60, Role.PEER, data) for data in (b"\x45", b"\x60" + bytes(39), clean()[0].data[:22])]
    assert judged(clean() + garbage) == []
