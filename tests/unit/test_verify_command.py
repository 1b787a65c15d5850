"""`criu-tcpcp verify` on made-up captures: its words, its JSON, its exit status, and what it says to nonsense."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from criu_tcpcp.cli import cmd_verify, main
from criu_tcpcp.verify import Packet, Role, builder
from criu_tcpcp.verify.packet import RST
from madeup import FLOW, LOCAL, MACS, PEER, Talk, passed

CLEAN, VIOLATED, USAGE, REFUSED = 0, 1, 2, 3
NAMED = f"{LOCAL}-{PEER}"


class Command:
    """The command in this process, in a directory of its own."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory, self._capsys = directory, capsys

    def write(self, name: str, packets: list[Packet], *, ng: bool = False) -> str:
        """A capture file; its name."""
        frames = builder.frames_of(packets)
        Path(self.directory, name).write_bytes(builder.pcapng(frames) if ng else builder.pcap(frames))
        return name

    def __call__(self, *argv: str) -> tuple[int, str, str]:
        """(exit status, stdout, stderr)"""
        status = main.main(["verify", *argv])
        said = self._capsys.readouterr()
        return status, said.out, said.err

    def judges(self, *argv: str) -> Any:
        status, out, err = self("--json", *argv)
        assert err == ""
        value = json.loads(out)
        assert status == (CLEAN if value["ok"] else VIOLATED)
        return value

    def refuses(self, status: int, words: str, *argv: str) -> None:
        code, out, err = self(*argv)
        if "--json" in argv:
            answer = json.loads(out)
            assert (code, answer["exit"], err) == (status, status, "")
            assert words in f"{answer['error']} ({answer['hint']})"
            return
        assert (code, out) == (status, ""), err
        (line,) = err.splitlines()
        assert line.startswith("criu-tcpcp: ")
        assert words in line, line
        assert len(line) < 1000


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(tmp_path, capsys)


def at(talk: Talk, role: Role) -> list[Packet]:
    """What an egress capture holds."""
    return [packet for packet in talk.packets if packet.ether_src in (MACS[role], MACS[Role.PEER])]


def three(command: Command, talk: Talk) -> list[str]:
    return [command.write("peer.pcap", talk.packets), command.write("origin.pcapng", at(talk, Role.ORIGIN), ng=True),
            command.write("destination.pcap", at(talk, Role.DESTINATION))]


def test_a_clean_pass_in_words(command: Command) -> None:
    status, out, err = command(*three(command, passed()))
    assert (status, err) == (CLEAN, "")
    lines = out.splitlines()
    assert lines[:3] == [
        "captures: peer.pcap (peer, 21 packets), origin.pcapng (origin, 18 packets), "
        "destination.pcap (destination, 17 packets)",
        f"{FLOW}: the peer could not tell",
        "  packets: 3 from the destination, 4 from the origin, 14 from the peer"]
    assert lines[3].startswith("  the origin spoke from ")
    assert lines[4].startswith("  the destination spoke from ")
    assert lines[4].endswith(" [destination.pcap packet 10]")
    assert lines[5].startswith("  longest gap as the peer saw it: 1.000 ms from ")
    assert lines[6] == ("  sent again by the passed end: 0 segments (0 of them tail-loss probes); "
                        "window and keep-alive probes: 0")
    assert "  not judged: 9: the peer's kernel counters: not given" in lines


def test_a_violation_in_words_and_as_json(command: Command) -> None:
    talk = passed()
    bad = talk.ack(flags=RST, ether_src=MACS[Role.ORIGIN])
    files = three(command, talk)
    status, out, err = command(*files)
    assert (status, err) == (VIOLATED, "")
    lines = out.splitlines()
    assert lines[1] == f"{FLOW}: 2 violations"
    assert lines[2].startswith(f"  1. no RST, SYN, unasked FIN or ICMP: RST from the origin, seq {bad.seq} "
                               f"[peer.pcap packet {bad.number}, ")
    assert lines[2].endswith(f", seq {bad.seq}]")
    assert lines[3].startswith("  2. origin silent after the destination's first packet: ")
    value = command.judges(*files)
    (connection,) = value["connections"]
    assert [one["assertion"] for one in connection["violations"]] == [1, 2]
    assert value.keys() == {"schema", "ok", "captures", "connections", "not_judged"}
    assert connection.keys() == {"connection", "flow", "ok", "violations", "not_checked", "counts", "stall_ns",
                                 "stall_at_ns", "gap_ns", "turns"}
    violation = connection["violations"][0]
    assert (violation["capture"], violation["number"], violation["time_ns"], violation["seq"]) == (
        "peer.pcap", bad.number, bad.time_ns, bad.seq)


def test_many_violations_are_cut_short_in_words_only(command: Command) -> None:
    talk = passed()
    for _ in range(30):
        talk.ack(ttl=63)
    command.write("peer.pcap", talk.packets)
    assert "  and 10 more (--json has them all)\n" in command("peer.pcap")[1]
    assert len(command.judges("peer.pcap")["connections"][0]["violations"]) == 30


def test_one_capture_at_the_peer_is_enough_and_says_what_it_cannot_show(command: Command) -> None:
    talk = passed()
    talk.packets = [packet if packet.src == PEER else replace(packet, ttl=63, ether_src=b"router")
                    for packet in talk.packets]
    command.write("trace.pcap", talk.packets)
    value = command.judges("trace.pcap")
    assert value["captures"][0]["role"] == "peer"
    (connection,) = value["connections"]
    assert any(text.startswith("2: which host sent which packet cannot be told") for text in connection["not_checked"])
    assert connection["turns"] == []
    assert "7 from the passed end, whose host cannot be told" in command("trace.pcap")[1]


def test_roles_are_named_by_option(command: Command) -> None:
    talk = passed()
    names = [command.write(name, packets) for name, packets in
             (("a", talk.packets), ("b", at(talk, Role.ORIGIN)), ("c", at(talk, Role.DESTINATION)))]
    options = [f"--peer={names[0]}", f"--origin={names[1]}", f"--destination={names[2]}"]
    assert [one["role"] for one in command.judges(*options)["captures"]] == ["peer", "origin", "destination"]
    assert command.judges(names[0], *options[1:])["captures"][0] == {"file": "a", "role": "peer", "packets": 21}
    command.refuses(USAGE, "where was a taken?", *names)
    command.write("peer.pcap", talk.packets)
    command.refuses(USAGE, "only one capture can be the peer's", "peer.pcap", "--peer", "a")
    command.refuses(USAGE, "no capture was given")


def test_connections_are_chosen_or_all_judged(command: Command) -> None:
    talk, other = passed(), passed()
    second = replace(PEER, port=6000)
    other.packets = [replace(packet, src=second if packet.src == PEER else LOCAL,
                             dst=second if packet.dst == PEER else LOCAL) for packet in other.packets]
    third = [replace(packet, src=replace(packet.src, port=7), ether_src=b"single") for packet in talk.packets
             if packet.src == PEER]
    command.write("peer.pcap", [*talk.packets, *other.packets, *third])
    value = command.judges("peer.pcap")
    names = [str(FLOW), f"{LOCAL} <-> {second}"]
    assert [one["connection"] for one in value["connections"]] == names
    assert value["not_judged"] == [{"connection": f"10.0.0.9:7 <-> {LOCAL}",
                                    "why": "each end has one Ethernet source: it was not passed"}]
    assert "10.0.0.9:7 <-> 10.0.0.1:80: not judged: " in command("peer.pcap")[1]
    for wanted, judged in ((f"{LOCAL}-{second}", names[1:]), (names[1], names[1:]), (NAMED, names[:1])):
        value = command.judges("peer.pcap", "--connection", wanted)
        assert [one["connection"] for one in value["connections"]] == judged
    assert len(command.judges("peer.pcap", "--connection", str(LOCAL))["connections"]) == 3
    command.refuses(REFUSED, "no packet of 10.0.0.1:81 in the captures, but of ", "peer.pcap",
                    "--connection", "10.0.0.1:81")


@pytest.mark.parametrize("wanted", ["", "-", "10.0.0.1", "10.0.0.1:80-", f"{NAMED}-{LOCAL}", "::1:80", "[10.0.0.1]:80",
                                    "10.0.0.1:0", "10.0.0.1:99999", "h:80", "x" * 5000])
def test_a_connection_that_is_none(command: Command, wanted: str) -> None:
    command.write("peer.pcap", passed().packets)
    command.refuses(USAGE, "--connection", "peer.pcap", f"--connection={wanted}")


def test_which_end_was_passed_must_be_named_where_nothing_tells_it(command: Command) -> None:
    talk = Talk()
    talk.exchange()
    command.write("peer.pcap", talk.packets)
    command.refuses(REFUSED, "which end was passed cannot be told", "peer.pcap")
    assert command.judges("peer.pcap", "--connection", NAMED)["ok"]


def test_what_only_the_caller_knows(command: Command) -> None:
    talk = passed()
    talk.say(False, b"\x67" * 40, seq=talk.next[False] - 40)
    command.write("peer.pcap", talk.packets)
    assert command.judges("peer.pcap")["ok"]
    (again,) = command.judges("peer.pcap", "--loss-free")["connections"][0]["violations"]
    assert again["assertion"] == 9
    talk = passed()
    talk.at = Role.ORIGIN
    talk.exchange()
    talk.say(True, flags=0x11)
    command.write("peer.pcap", talk.packets)
    assert not command.judges("peer.pcap")["ok"]
    assert command.judges("peer.pcap", "--passes", "2", "--closed-by", "peer")["ok"]
    assert not command.judges("peer.pcap", "--passes", "2", "--closed-by", "nobody")["ok"]


def test_a_capture_from_the_middle_and_what_was_negotiated(command: Command) -> None:
    talk = passed()
    talk.packets = talk.packets[5:]
    talk.ack(window=999)
    command.write("peer.pcap", talk.packets)
    (connection,) = command.judges("peer.pcap")["connections"]
    assert any(text.startswith("5: ") for text in connection["not_checked"])
    value = command.judges("peer.pcap", "--negotiated", "mss=1460,wscale=7,timestamps=yes,sack=yes,ecn=no")
    assert [one["assertion"] for one in value["connections"][0]["violations"]] == [5]
    for wrong in ("", "mss", "mss=x", "mss=65536", "wscale=15", "sack=1", "ttl=64", "mss=1460,"):
        command.refuses(USAGE, "--negotiated", "peer.pcap", f"--negotiated={wrong}")


def test_the_peers_counters(command: Command) -> None:
    command.write("peer.pcap", passed().packets)
    for name, number in (("before", 3), ("after", 4)):
        Path(name).write_text(f"TcpExt: TCPTimeouts PAWSEstab\nTcpExt: {number} 0\n")
    assert command.judges("peer.pcap", "--counters", "before", "before")["ok"]
    (moved,) = command.judges("peer.pcap", "--counters", "before", "after")["connections"][0]["violations"]
    assert (moved["assertion"], moved["packet"], moved["number"]) == (9, None, None)
    assert "TCPTimeouts went from 3 to 4\n" in command("peer.pcap", "--counters", "before", "after")[1]
    Path("snmp").write_text("Tcp: A\nTcp: 1\n")
    command.refuses(REFUSED, "snmp: not /proc/net/netstat", "peer.pcap", "--counters", "before", "snmp")
    command.refuses(REFUSED, "peer.pcap: not /proc/net/netstat", "peer.pcap", "--counters", "peer.pcap", "before")
    command.refuses(REFUSED, "cannot read 'none'", "peer.pcap", "--counters", "none", "before")


def nonsense(directory: Path) -> dict[str, str]:
    """What each unusable file is called, and what is said about it. The files are made."""
    whole = builder.pcap(builder.frames_of(passed().packets))
    ng = builder.pcapng(builder.frames_of(passed().packets))
    other = builder.pcap([(0, bytes(12) + b"\x08\x06" + bytes(28), 42)])
    for name, data in (("cut", whole[:-3]), ("cut-in-header", whole[:30]), ("ng-cut", ng[:-3]), ("gif", b"GIF89a" * 5),
                       ("empty", b""), ("no-packets", whole[:24]), ("ng-no-packets", builder.pcapng([])),
                       ("no-tcp", other), ("link", builder.pcap([(0, bytes(40), 40)], link_type=105))):
        Path(directory, name).write_bytes(data)
    Path(directory, "directory").mkdir()
    os.mkfifo(Path(directory, "fifo"))
    with open(Path(directory, "huge"), "wb") as huge:
        huge.truncate(cmd_verify._LARGEST + 1)
    return {"cut": "cut: packet 21 claims 66 bytes, the file has 63 left (was tcpdump killed? use -U)",
            "cut-in-header": "cut-in-header: the file ends inside the header of packet 1",
            "ng-cut": "ng-cut: the block at byte", "gif": "gif: neither pcap nor pcapng",
            "empty": "empty: 0 bytes are too few", "no-packets": "no-packets: there is no TCP packet in it",
            "ng-no-packets": "ng-no-packets: there is no TCP packet in it",
            "no-tcp": "no-tcp: there is no TCP packet in it", "link": "link: packet 1 has link type 105",
            "directory": "directory is a directory", "fifo": "fifo is not a regular file",
            "huge": "huge has 1024 MiB, 1024 can be read (cut it down: ", "missing": "cannot read 'missing': No such",
            "n" * 5000: "File name too long", "\0": "cannot read '\\x00'"}


def test_nonsense_is_one_clear_line(command: Command) -> None:
    for name, words in nonsense(command.directory).items():
        command.refuses(REFUSED, words, name)
        command.refuses(REFUSED, words, "--peer", name, "--json")


@pytest.mark.parametrize("argv", [["--passes", "-1"], ["--passes", "x"], ["--closed-by", "nature"], ["--counters", "a"],
                                  ["--peer"], ["--nonsense"]], ids=" ".join)
def test_usage(command: Command, argv: list[str]) -> None:
    command.refuses(USAGE, argv[0], "peer.pcap", *argv)


def test_what_the_path_turned_around_is_no_violation_where_it_may(command: Command) -> None:
    talk = passed()
    files = three(command, talk)
    answers = [number for number, packet in enumerate(talk.packets) if packet.src == LOCAL]
    late = talk.packets[answers[2]]
    later = replace(late, time_ns=talk.packets[answers[3]].time_ns + 1)
    command.write("peer.pcap", sorted([*(one for one in talk.packets if one is not late), later],
                                      key=lambda packet: packet.time_ns))
    assert not command.judges(*files)["ok"]
    assert command.judges("--reorders", *files)["ok"]
    command.refuses(REFUSED, "at the peer and at the hosts", "--reorders", files[0])
