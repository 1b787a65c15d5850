"""`criu-tcpcp demo`: what its tables say is true, and it leaves nothing, whatever ends it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from criu_tcpcp import verify
from criu_tcpcp.cli import cmd_demo
from criu_tcpcp.demo import download, plot
from criu_tcpcp.lab import network
from criu_tcpcp.lab.processes import inside, of_directory
from criu_tcpcp.lab.record import Record, records
from criu_tcpcp.lab.streams import Stream
from waiting import until
from world import COMMAND

pytestmark = pytest.mark.root

SIZE = 128 << 20
RATE = 8.0  # a busy machine takes seconds to start a pass
SVG = "{http://www.w3.org/2000/svg}"


class Played:
    """One demo, with all that it saw."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.captures: dict[str, verify.Capture] = {}
        parse = verify.parse

        def keep(data: bytes, name: str, role: verify.Role | None = None) -> verify.Capture:
            self.captures[name] = parse(data, name, role)
            return self.captures[name]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verify, "parse", keep)
            self.result = download.play(size=SIZE, rate=RATE, say=self.lines.append)


def the_peer_got_the_file(played: Played) -> None:
    result = played.result
    assert result.problems() == []
    digest = Stream(download.SEED).sha256(SIZE)
    assert result.sha256 == {"peer": digest, "origin": digest, "destination": digest}
    assert (result.curl_status, result.downloaded) == (0, SIZE)


def the_bytes_of_both_hosts_are_all_that_curl_got(played: Played) -> None:
    result = played.result
    by_host = result.bytes_by_host
    assert by_host["unknown"] == 0
    assert by_host["origin"] + by_host["destination"] == SIZE + result.head
    (taken_over,) = [int(line.split()[-1]) for line in played.lines
                     if line.startswith("destination |") and "from byte" in line]
    assert 0 < taken_over < SIZE
    # What the origin's kernel had not sent yet, the destination's did.
    assert by_host["origin"] <= taken_over + result.head
    assert by_host["destination"] >= SIZE - taken_over


def the_stall_is_the_verifiers_and_is_in_the_capture(played: Played) -> None:
    result = played.result
    assert result.gap_ms == result.verdict.stall.gap_ns / 1e6
    flow = result.verdict.flow
    times = [one.time_ns for one in played.captures["peer"].packets if (one.src, one.dst) == (flow.local, flow.peer)]
    assert result.verdict.stall.gap_ns == max(later - one for one, later in itertools.pairwise(times))
    (switch,) = result.switches
    assert (switch.old, switch.new) == (verify.Role.ORIGIN, verify.Role.DESTINATION)
    assert {switch.last_ns, switch.first_ns} <= set(times)
    assert 0 < switch.silence_ms <= result.gap_ms


def the_tables_show_the_numbers(played: Played, said: str) -> None:
    result = played.result
    hosts = [result.bytes_by_host[host] for host in ("origin", "destination")]
    for number in (*result.addresses.values(), *hosts, SIZE, result.sha256["peer"], f"{result.gap_ms:.1f} ms"):
        assert str(number) in said
    for step in result.reports[0]["steps"]:
        assert f"{step['ms']:.3f}" in said
    assert said.count("holds") == 10
    assert "could not tell" in said


def the_json_has_what_its_description_says(played: Played) -> None:
    value = json.loads(json.dumps(played.result.to_json()))
    assert value.keys() == {"schema", "ok", "problems", "size", "rate", "seconds", "hosts", "curl", "sha256",
                            "stall_ms", "usual_gap_ms", "switches", "retransmissions", "tail_loss_probes", "resets",
                            "assertions", "passes"}
    assert (value["schema"], value["ok"], value["problems"], value["size"]) == (1, True, [], SIZE)
    assert value["hosts"]["peer"].keys() == {"address"}
    for host in ("origin", "destination"):
        assert value["hosts"][host].keys() == {"address", "packets", "bytes"}
    assert value["curl"].keys() == {"exit", "bytes", "head"}
    assert [one["number"] for one in value["assertions"]] == list(range(1, 11))
    assert value["resets"] == {"passed": 0, "peer": 0}
    (report,) = value["passes"]
    assert (report["schema"], report["owner"], report["exit"]) == (1, "destination", 0)


def the_picture_has_both_hosts_in_both_panels(played: Played) -> None:
    root = ElementTree.fromstring(plot.svg(played.result.record, "a title & more"))
    for host in ("origin", "destination"):
        groups = [group for group in root.iter(f"{SVG}g") if group.get("class") == host]
        assert {one.tag for group in groups for one in group} == {f"{SVG}circle", f"{SVG}line"}
    assert [one.get("class") for one in root.iter(f"{SVG}rect")].count("pass") == 2
    assert any(one.get("class") == "acknowledged" for one in root.iter(f"{SVG}path"))
    words = " ".join(one.text or "" for one in root.iter(f"{SVG}text"))
    for label in ("a title & more", "s", "MB", "ms", "kB", "sent by the origin", "sent by the destination"):
        assert label in words


def test_what_it_says_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    played = Played()
    assert [one for one in records() if one.creator_pid == os.getpid()] == []
    the_peer_got_the_file(played)
    the_bytes_of_both_hosts_are_all_that_curl_got(played)
    the_stall_is_the_verifiers_and_is_in_the_capture(played)
    the_json_has_what_its_description_says(played)
    the_picture_has_both_hosts_in_both_panels(played)
    cmd_demo._print(played.result)
    the_tables_show_the_numbers(played, capsys.readouterr().out)


# -- the command -------------------------------------------------------------------------------------------------------

class Running:
    """The command, once curl is at work."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen([COMMAND, "demo", *options], text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "sends big.bin" in line:
                break
        (self.record,) = [one for one in records() if one.creator_pid == self.process.pid]

    def find(self, name: str) -> int:
        """A process of the lab by the name of its program."""
        def found() -> list[int]:
            return [pid for pid in inside(namespaces(self.record))
                    if Path(f"/proc/{pid}/comm").read_text().strip() == name]
        until(found, name)
        return found()[0]

    def end(self) -> tuple[int, str]:
        _out, err = self.process.communicate(timeout=60)
        assert list(inside(namespaces(self.record))) == []
        assert list(of_directory(self.record.directory)) == []
        assert [path for path in (*namespaces(self.record), self.record.directory) if path.exists()] == []
        assert self.record not in list(records())
        return self.process.returncode, err


def namespaces(record: Record) -> list[Path]:
    return [network.NETNS_DIRECTORY / record.namespace(host) for host in network.places(record.servers)]


def test_interrupted_it_leaves_nothing() -> None:
    demo = Running()
    demo.process.send_signal(signal.SIGINT)
    demo.process.send_signal(signal.SIGINT)
    assert demo.end() == (130, "criu-tcpcp: interrupted\n")


def test_terminated_it_leaves_nothing() -> None:
    demo = Running()
    demo.process.send_signal(signal.SIGTERM)
    assert demo.end() == (-signal.SIGTERM, "")


@pytest.mark.parametrize(("victim", "words"), [("curl", "curl ended with status -9"),
                                               ("tcpdump", "tcpdump at the")])
def test_a_child_that_is_killed_ends_it_in_one_line(victim: str, words: str) -> None:
    demo = Running("--size", "64", "--rate", "4")
    os.kill(demo.find(victim), signal.SIGKILL)
    status, err = demo.end()
    assert status == 3
    (line,) = err.splitlines()
    assert words in line


@pytest.mark.parametrize(("options", "words"), [
    (["--plot", "/no/such/directory/x.svg"], "there is no directory /no/such/directory"),
    (["--plot", "/"], "is a directory"),
    (["--size", "0"], "not a number from 1"), (["--rate", "x"], "not a number from 1"),
    (["--size", "1"], "the download would be over before the pass"), (["--rate", "99999"], "not a number from 1")])
def test_nonsense_is_refused_in_one_line(options: list[str], words: str) -> None:
    done = subprocess.run([COMMAND, "demo", *options], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert words in line
