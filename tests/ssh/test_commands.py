"""What the commands say when all is well: the words and the JSON that people and orchestrators rely on."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from attempt import conversation, exchange
from criu_tcpcp.lab import leftovers
from world import COMMAND

pytestmark = pytest.mark.root

REPORT = {"schema", "id", "owner", "exit", "connection", "into", "redirect", "steps", "stall_ms", "left", "error"}


def test_check_here_and_there() -> None:
    with conversation(register=False, captured=False) as (here, _peer):
        origin = here.lab.origin
        before, there = leftovers(origin), leftovers(here.lab.destination)
        assert origin.run([COMMAND, "check"]).stdout.splitlines()[-1] == "Looks good."
        said = origin.run([COMMAND, "check", "--json", *here.lab.ssh_options(here.lab.destination)]).stdout
        answer = json.loads(said)
        assert {one["name"] for one in answer["features"]} >= {"tcp-repair", "hold", "rules", "stop", "images"}
        assert all(one["works"] for one in answer["features"] if one["required"])
        assert set(answer["host"]) == {"host", "version", "features"}
        assert [one["name"] for one in answer["host"]["features"]] == [one["name"] for one in answer["features"]]
        assert all(one["works"] for one in answer["host"]["features"] if one["required"])
        assert leftovers(here.lab.destination) == there
        lines = origin.run([COMMAND, "check", *here.lab.ssh_options(here.lab.destination)]).stdout.splitlines()
        assert len(lines) == 2 * len(answer["features"]) + 2
        assert origin.run([COMMAND, "check", "--feature", "tcp-repair"]).returncode == 0
        assert leftovers(origin) == before


def test_check_tells_what_the_other_host_lacks() -> None:
    with conversation(register=False, captured=False) as (here, _peer):
        ssh = here.lab.ssh_options(here.lab.destination)
        limited = f"setpriv --bounding-set -net_raw --inh-caps -net_raw {COMMAND}"
        done = here.lab.origin.run([COMMAND, "check", *ssh, "--remote-command", limited], check=False)
        ours, _, theirs = done.stdout.partition(": criu-tcpcp ")
        assert "FAIL" not in ours
        assert "  FAIL  raw-packets: " in theirs
        assert "  ok    tcp-repair: " in theirs
        assert "Looks good." not in done.stdout
        assert done.returncode == 3, done


def test_from_list_to_release() -> None:
    """One connection's life with the tool, as an operator sees it."""
    with conversation(register=False) as (here, peer):
        exchange(peer, b"before")
        origin, destination = here.lab.origin, here.lab.destination
        rows = [json.loads(line) for line in here.listed("--json").splitlines()]
        (connection,) = [row for row in rows if row["peer"]]
        assert connection["passable"] is True
        assert connection["fds"] == [here.descriptor()]
        assert connection["state"] == "ESTAB"
        (listener,) = [row for row in rows if not row["peer"]]
        assert listener["why_not"] == "is a listening socket, which has no peer"

        before = leftovers(origin)
        preview = origin.run(here.pass_argv("--dry-run")).stdout
        assert json.loads(preview)["redirect"].startswith("forward: ")
        assert leftovers(origin) == before

        report = here.pass_once()
        assert report.keys() >= REPORT
        assert (report["schema"], report["owner"], report["exit"]) == (1, "destination", 0)
        assert {step["side"] for step in report["steps"]} == {"origin", "destination"}
        assert all(step.keys() == {"side", "name", "ms"} for step in report["steps"])
        exchange(peer, b"after")

        for host, side, state, rule in ((origin, "origin", "done", "moved_10_77_2_12_if"),
                                        (destination, "destination", "active", "diverted")):
            (known,) = map(json.loads, host.run([COMMAND, "passes", "--json"]).stdout.splitlines())
            assert (known["id"], known["side"], known["state"]) == (report["id"], side, state)
            assert any(name.startswith(rule) for name in known["rules"])
            kept = host.run([COMMAND, "release"]).stdout
            assert kept.startswith(f"kept {report['id']} ({side}): its connection is alive")
        exchange(peer, b"and still")

        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.node.wait_for("end")
        assert origin.run([COMMAND, "release"]).stdout == f"released {report['id']} (origin)\n"
        assert destination.run([COMMAND, "release", report["id"]]).stdout == f"released {report['id']} (destination)\n"
        assert destination.run([COMMAND, "release", report["id"]]).stdout == "nothing to release\n"
        here.prove()
        assert here.release() == []


def test_a_connection_to_the_host_itself_is_not_passable() -> None:
    with conversation(register=False, captured=False) as (here, _peer):
        origin = here.lab.origin
        program = origin.spawn([sys.executable, "-c", f"""if True:
            import socket, time
            listener = socket.create_server(({str(origin.ipv4)!r}, 0))
            one = socket.create_connection(listener.getsockname())
            two = listener.accept()
            print(flush=True)
            time.sleep(1000)
        """], stdout=subprocess.PIPE)
        assert program.stdout is not None
        program.stdout.readline()
        listed = origin.run([COMMAND, "list", "--json", "--pid", str(program.pid)]).stdout
        ends = [row for row in map(json.loads, listed.splitlines()) if row["peer"]]
        assert len(ends) == 2
        assert all("is on the origin host itself" in row["why_not"] for row in ends)


def test_the_report_for_people() -> None:
    with conversation(register=False) as (here, peer):
        argv = [word for word in here.pass_argv("-v") if word != "--json"]
        said = here.lab.origin.run(argv).stdout
        here.owner = here.lab.destination
        assert said.startswith(f"passed {here.flow}\n  into: receiver ")
        assert "packets of the peer were held for " in said
        assert "restore" in said
        exchange(peer, b"after")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.node.wait_for("end")
        here.prove(passes=1)
        assert here.release() == []
