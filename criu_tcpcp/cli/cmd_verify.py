"""Prove on captures that the peer of a passed connection could not tell: by what reached it and what left the hosts."""

from __future__ import annotations

import argparse
import re
import stat
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.endpoint import Endpoint
from ..core.errors import ExitCode, Refused, UsageError
from . import console

if TYPE_CHECKING:
    from ..verify import Capture, Connection, Expectations, Negotiated, Role, Verdict, Violation

HELP = "prove on captures that the peer could not tell"

_LARGEST = 1 << 30      # bytes of a file, which is read as a whole
_SHOWN = 20
_VIOLATED = 1
_ROLES = ("peer", "origin", "destination")
_CLOSERS = {"nobody": (False, False), "peer": (False, True), "passed": (True, False), "both": (True, True)}
_SENDERS = {"peer": "the peer", "origin": "the origin", "destination": "the destination",
            "unknown": "the passed end, whose host cannot be told"}
_SWITCH = {"yes": True, "no": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("captures", nargs="*", metavar="CAPTURE",
                        help="pcap or pcapng, its place told by its name (peer*, origin*, destination*); one alone, of "
                        "another name, was taken at the peer")
    for role, place in (("peer", "at the peer"), ("origin", "where packets leave the origin"),
                        ("destination", "where packets leave the destination")):
        parser.add_argument(f"--{role}", metavar="FILE", help=f"the capture that was taken {place}")
    parser.add_argument("--connection", metavar="LOCAL[-PEER]",
                        help="only this one, or those of this end; LOCAL, as ADDRESS:PORT, is the end that was passed "
                        "(default: all that were passed, as far as the captures tell)")
    parser.add_argument("--passes", type=_count, default=1, metavar="N",
                        help="how often it was passed, there and back in turn (default: %(default)s)")
    parser.add_argument("--loss-free", action="store_true",
                        help="the path loses nothing: what is sent again is judged, not only counted")
    parser.add_argument("--reorders", action="store_true",
                        help="the path may change the order of packets: judge them in the order in which they were "
                        "sent, by captures of all three hosts")
    parser.add_argument("--closed-by", choices=list(_CLOSERS),
                        help="whose application closed: other FINs are violations")
    parser.add_argument("--negotiated", metavar="NAME=VALUE,...",
                        help="where the captures begin later than the connection: mss=N, wscale=N, and timestamps, "
                        "sack, ecn=yes|no, as `ss -ti` at the passed end shows them")
    parser.add_argument("--counters", nargs=2, metavar=("BEFORE", "AFTER"),
                        help="copies of the peer's /proc/net/netstat, from before and after")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from .. import verify
    expect = _expectations(arguments)
    counters = _counters(arguments.counters)
    captures = [_capture(name, role) for name, role in _places(arguments)]
    judged, others = _chosen(captures, arguments.connection)
    parts = verify.narrowed(captures, [one.flow for one in judged if one.flow is not None])
    verdicts = [verify.verify(part, flow, expect, counters=counters) for flow, part in parts.items()]
    ok = all(verdict.ok for verdict in verdicts)
    if arguments.json:
        console.result_json({
            "schema": 1, "ok": ok,
            "captures": [{"file": one.name, "role": str(one.role), "packets": len(one.packets)} for one in captures],
            "connections": [{"connection": str(verdict.flow), **verdict.to_json()} for verdict in verdicts],
            "not_judged": [{"connection": str(one), "why": one.why_not} for one in others]})
    else:
        _print(captures, verdicts, others)
    return int(ExitCode.OK) if ok else _VIOLATED


# -- what was asked ----------------------------------------------------------------------------------------------------

def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a number")
    return int(text)


def _places(arguments: argparse.Namespace) -> list[tuple[str, Role]]:
    """(file, where it was taken)"""
    from ..verify import Role
    found = [(name, Role.of_name(name)) for name in arguments.captures]
    if len(found) == 1 and found[0][1] is Role.UNKNOWN and not arguments.peer:
        found = [(arguments.captures[0], Role.PEER)]
    found += [(name, Role(role)) for role in _ROLES if (name := getattr(arguments, role)) is not None]
    if not found:
        raise UsageError("no capture was given", hint="criu-tcpcp verify CAPTURE, or --peer, --origin, --destination")
    for name, role in found:
        if role is Role.UNKNOWN:
            raise UsageError(f"where was {name} taken?", hint="--peer FILE, --origin FILE, --destination FILE")
    for role in Role:
        same = [name for name, other in found if other is role]
        if len(same) > 1:
            raise UsageError(f"{' and '.join(same)}: only one capture can be the {role}'s",
                             hint="one for each of --peer, --origin, --destination; mergecap joins the parts of one")
    return found


def _expectations(arguments: argparse.Namespace) -> Expectations:
    from ..verify import Expectations
    fin_passed, fin_peer = _CLOSERS.get(arguments.closed_by, (None, None))
    return Expectations(negotiated=_negotiated(arguments.negotiated), loss_free=arguments.loss_free,
                        reorders=arguments.reorders, passes=arguments.passes, fin_passed=fin_passed, fin_peer=fin_peer)


def _negotiated(text: str | None) -> Negotiated:
    from ..verify import Negotiated
    names = {"mss": "mss", "wscale": "window_scale", "timestamps": "timestamps", "sack": "sack", "ecn": "ecn"}
    limits = {"mss": 65535, "wscale": 14}
    found: dict[str, Any] = {}
    for item in text.split(",") if text is not None else []:
        name, _, value = item.partition("=")
        number = int(value) if value.isascii() and value.isdigit() and len(value) < 6 else -1
        if name in limits and 0 <= number <= limits[name]:
            found[names[name]] = number
        elif name in names and name not in limits and value in _SWITCH:
            found[names[name]] = _SWITCH[value]
        else:
            raise UsageError(f"--negotiated {item[:40]!r}: mss=0..65535, wscale=0..14, timestamps, sack, ecn=yes|no")
    return Negotiated(**found)


def _chosen(captures: list[Capture], wanted: str | None) -> tuple[list[Connection], list[Connection]]:
    """The connections to judge, and the others."""
    from ..verify import CaptureError, find_connections
    from ..verify.connections import listed
    found = find_connections(captures)
    if wanted is None:
        judged = [one for one in found if one.flow is not None]
        if not judged:
            raise CaptureError(f"no connection can be judged: {listed(found)}", hint="--connection LOCAL-PEER names it")
        return judged, [one for one in found if one.flow is None]
    ends = _ends(wanted)
    judged = [one.named_from(ends[0]) for one in found if set(ends) <= set(one.ends)]
    if not judged:
        raise CaptureError(f"no packet of {wanted} in the captures, but of {listed(found)}")
    return judged, []


def _ends(text: str) -> list[Endpoint]:
    """LOCAL, or LOCAL and PEER: joined by a hyphen, or as the other commands print them."""
    try:
        ends = [Endpoint.parse(part) for part in re.split(" <-> |-", text)]
    except ValueError as error:
        raise UsageError(f"--connection: {error}") from None
    if len(ends) > 2:
        raise UsageError(f"--connection {text[:80]!r}: LOCAL, or LOCAL-PEER")
    return ends


# -- files -------------------------------------------------------------------------------------------------------------

def _read(name: str) -> bytes:
    try:
        found = Path(name).stat()
        if not stat.S_ISREG(found.st_mode):
            what = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise Refused(f"{name} is {what}", hint="tcpdump -w FILE makes a capture")
        if found.st_size > _LARGEST:
            raise Refused(f"{name} has {found.st_size >> 20} MiB, {_LARGEST >> 20} can be read",
                          hint="cut it down: tcpdump -r IN -w OUT 'tcp and port ...'")
        return Path(name).read_bytes()
    except (OSError, ValueError) as error:
        raise Refused(f"cannot read {name[:200]!r}: {getattr(error, 'strerror', None) or error}") from None


def _capture(name: str, role: Role) -> Capture:
    from ..verify import CaptureError, parse
    try:
        capture = parse(_read(name), name, role)
    except CaptureError as error:
        raise CaptureError(f"{name}: {error.message}", hint=error.hint) from None
    except MemoryError:
        raise Refused(f"{name} is too large for this machine's memory",
                      hint="cut it down: tcpdump -r IN -w OUT 'tcp and port ...'") from None
    if not capture.packets:
        raise CaptureError(f"{name}: there is no TCP packet in it")
    return capture


def _counters(names: list[str] | None) -> tuple[dict[str, int], dict[str, int]] | None:
    from ..verify import CaptureError, parse_netstat
    if names is None:
        return None
    found = []
    for name in names:
        try:
            found.append(parse_netstat(_read(name).decode(errors="replace")))
        except CaptureError as error:
            raise CaptureError(f"{name}: {error.message}") from None
        if "TcpExtTCPTimeouts" not in found[-1]:
            raise CaptureError(f"{name}: not /proc/net/netstat: it has no TCPTimeouts")
    return found[0], found[1]


# -- words -------------------------------------------------------------------------------------------------------------

def _print(captures: list[Capture], verdicts: Iterable[Verdict], others: list[Connection]) -> None:
    console.result("captures: " + ", ".join(f"{one.name} ({one.role}, {len(one.packets)} packets)" for one in captures))
    for verdict in verdicts:
        _print_verdict(verdict)
    for one in others[:_SHOWN]:
        console.result(f"{one}: not judged: {one.why_not}")
    if len(others) > _SHOWN:
        console.result(f"{len(others) - _SHOWN} more connections: not judged")


def _print_verdict(verdict: Verdict) -> None:
    number = len(verdict.violations)
    said = f"{number} violation{'s' * (number > 1)}" if number else "the peer could not tell"
    console.result(f"{verdict.flow}: {said}")
    for violation in verdict.violations[:_SHOWN]:
        console.result(f"  {violation.assertion}. {violation.name}: {violation.reason}{_where(violation)}")
    if number > _SHOWN:
        console.result(f"  and {number - _SHOWN} more (--json has them all)")
    counts = verdict.counts
    console.result("  packets: " + ", ".join(f"{packets} from {_SENDERS[host]}"
                                             for host, packets in counts.packets.items()))
    for turn in verdict.turns:
        console.result(f"  the {turn.host} spoke from {_time(turn.packet.time_ns)} "
                       f"[{turn.packet.capture} packet {turn.packet.number}]")
    stall = f"{verdict.stall_ns / 1e6:.3f} ms from {_time(verdict.stall.at_ns)}" if verdict.stall_ns else "none"
    console.result(f"  longest gap as the peer saw it: {stall}")
    again, tails, probes = counts.retransmissions, counts.tail_loss_probes, counts.probes
    for end, name in (("passed", "the passed end"), ("peer", "the peer")):
        console.result(f"  sent again by {name}: {again[end]} segments ({tails[end]} of them tail-loss probes); "
                       f"window and keep-alive probes: {probes[end]}")
    for text in verdict.not_checked:
        console.result(f"  not judged: {text}")


def _where(violation: Violation) -> str:
    packet = violation.packet
    if packet is None:
        return ""
    seq = f", seq {packet.seq}" if hasattr(packet, "seq") else ""
    return f" [{packet.capture} packet {packet.number}, {_time(packet.time_ns)}{seq}]"


def _time(time_ns: int) -> str:
    """In local time, as `tcpdump -tttt` prints it."""
    return f"{datetime.fromtimestamp(time_ns // 10**9)}.{time_ns % 10**9 // 1000:06}"
