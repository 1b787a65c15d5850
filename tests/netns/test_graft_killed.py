"""Whenever the destination's serve is killed in the middle of a graft, the program survives, and hears an end or, at
worst, an error on a connection that it accepted from nobody."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from criu_tcpcp.lab import Lab, leftovers
from waiting import until
from world import PORT, Program

pytestmark = pytest.mark.root

ERRORS = ["[Errno 1] Operation not permitted", "[Errno 103] Software caused connection abort",
          "[Errno 107] Transport endpoint is not connected", "[Errno 22] Invalid argument"]
TESTS = Path(__file__).parents[1]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("model", "way", "times", "prologue"), [
    ("threads", "accept:{}", 24, ()), ("threads", "accept:{}", 12, ("hello",)),
    ("threads", "pid:{}", 24, ()), ("threads", "pid:{}:0", 24, ()),
    pytest.param("threads", "accept:{}", 300, (), marks=pytest.mark.long),
    pytest.param("threads", "accept:{}", 200, ("hello",), marks=pytest.mark.long),
    pytest.param("epoll-et", "accept:{}", 100, (), marks=pytest.mark.long),
    pytest.param("prefork", "accept:{}", 100, (), marks=pytest.mark.long),
    pytest.param("epoll", "pid:{}", 300, (), marks=pytest.mark.long)])
def test_a_graft_can_be_killed_at_every_point(lab: Lab, model: str, way: str, times: int,
                                              prologue: tuple[str, ...]) -> None:
    host = lab.destination
    server = Program(host, [sys.executable, str(TESTS / "servers.py"), model, "0.0.0.0", str(PORT)])
    pid = server.wait_for("listening")["pid"]
    if model == "prefork":
        pid = server.wait_for("worker", 2)["pid"]
    before = leftovers(host)
    done = host.run([sys.executable, str(TESTS / "killed_graft.py"), way.format(pid), str(pid), str(PORT), str(times),
                     *prologue],
                    check=False, timeout=800)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["points"] > 100
    # A graft passes more points while it waits for a busy machine: one that waits less may end before the last of them.
    assert told["killed"] >= times * 3 // 4
    until(lambda: server.count("end") + server.count("error") == server.count("serving"), "each connection to end")
    errors = {(one["doing"], one["error"]) for one in server.events if one["event"] == "error"}
    # Nobody was there to be answered but the prologue; its sender may have gone by then.
    assert errors <= ({("answer", text) for text in (*ERRORS, "[Errno 32] Broken pipe") if prologue}
                      | {("read", text) for text in ERRORS})
    assert [line for line in leftovers(host) if line not in before and not line.startswith("file d")] == []
