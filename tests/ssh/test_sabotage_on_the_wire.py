"""A pass that breaks a rule of the wire is found out, by the assertion that is meant for it; the same pass without the
bug is clean. So the verdicts of all other tests mean something. `criu-tcpcp verify` says the same of the same captures.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from criu_tcpcp import verify
from criu_tcpcp.verify import builder, container
from sabotaged import BUGS, sabotaged
from waiting import until
from world import COMMAND, Peer, World, world

pytestmark = pytest.mark.root

#: bug -> (assertion, its words)
CAUGHT_BY = {
    "tsval-back": (6, "less than the one before"),
    "tsecr-zero": (6, "TSecr 0 was never sent by the peer"),
    "origin-rst": (1, "RST from the origin"),
    "lost-byte": (3, "1 beyond what was sent"),
    "shrunk-window": (5, "the right edge went back by"),
    "origin-speaks": (2, "after the destination's first packet"),
}


def so_far(here: World) -> list[verify.Violation]:
    """What the captures show already; nothing while one is being written."""
    with contextlib.suppress(verify.CaptureError):
        captures = [verify.parse((here.lab.directory / f"{role}.pcap").read_bytes(), role, verify.Role(role))
                    for role in ("peer", "origin", "destination")]
        return list(verify.verify(captures, here.flow).violations)
    return []


def command_says(here: World, *options: str, ng: bool = False) -> tuple[int, Any]:
    """(exit status, the connection's verdict) of `criu-tcpcp verify` on the files that tcpdump wrote, or on the same
    frames as pcapng."""
    files = []
    for role in ("peer", "origin", "destination"):
        file = here.lab.directory / f"{role}.pcap"
        if ng:
            frames = container.frames(file.read_bytes())
            data = builder.pcapng((frame.time_ns, frame.data, frame.wire_len) for frame in frames)
            file = Path(here.lab.directory, f"{role}.pcapng")
            file.write_bytes(data)
        files.append(str(file))
    done = here.lab.peer.run([COMMAND, "verify", "--json", *options, *files], check=False)
    assert done.stderr == ""
    (connection,) = json.loads(done.stdout)["connections"]
    assert connection["connection"] == str(here.flow)
    return done.returncode, connection


def test_every_bug_has_its_assertion() -> None:
    assert CAUGHT_BY.keys() == set(BUGS)


@pytest.mark.parametrize("bug", [None, *BUGS], ids=["no-bug", *BUGS])
def test_a_pass_with_a_bug_is_found_out(bug: str | None) -> None:
    with world("rr", whole=True) as here:
        before = here.counters()
        peer = Peer(here, "rr-peer", "--rate", "200", "--until-eof")
        if bug is None:
            here.pass_once()
            report = peer.finish()
            assert report["error"] is None
            here.node.wait_for("end")
            verdict = here.prove(before, application=report)
            for ng in (False, True):
                status, said = command_says(here, "--loss-free", "--closed-by", "both", ng=ng)
                assert (status, said["violations"]) == (0, [])
                assert said["counts"] == verdict.counts.to_json()
                assert [turn["host"] for turn in said["turns"]] == ["origin", "destination"]
            assert here.release() == []
            return
        options, environment = sabotaged(bug)
        here.pass_once(*options, env=environment)
        number, words = CAUGHT_BY[bug]
        until(lambda: any(one.assertion == number for one in so_far(here)), f"{bug} to be noticed", every_s=0.1)
        found = [one for one in here.verdict(loss_free=False).violations if one.assertion == number]
        assert any(words in one.reason for one in found), found
        assert all(isinstance(one.packet, verify.Packet) for one in found)
        status, said = command_says(here)
        assert status == 1
        assert {(one["assertion"], one["number"]) for one in said["violations"]} >= {
            (number, one.packet.number) for one in found if one.packet is not None}
        peer.program.end()
