"""The guarded door as docs/door has it: an account without rights, and a serve with two capabilities that is the
program's user. sshd, sudo, setpriv and the kernel are real."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import pytest

from attempt import Attempt, conversation, exchange
from doors import UsersDoor, changed
from grafting import SEEN, finish, served, server
from waiting import until
from world import COMMAND, World

pytestmark = pytest.mark.root

USER, UID, GID = "www-data", 33, 33  # base-passwd's, on every Debian
RULES = changed(users=[USER])
#: As systemd's User= does: it executes the program as that user.
AS_USER = ["setpriv", "--reuid", USER, "--regid", str(GID), "--clear-groups"]
CAP_NET_ADMIN, CAP_NET_RAW = 12, 13  # linux/capability.h


def ends(here: World, peer: socket.socket, passes: int, **how: bool) -> None:
    peer.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    here.node.wait_for("end")
    here.prove(passes=passes, **how)
    left = here.release()
    assert left == [], "\n".join(left)


def test_a_receiver_gets_connections_there_and_back() -> None:
    """Root's own journals at that host are in nobody's way, nor the door's in root's."""
    with conversation(register=False, destination_options=("--user", str(UID))) as (here, peer), \
            UsersDoor(here, RULES, USER) as door:
        exchange(peer, b"before")
        for number in range(3):
            here.ssh_options = [] if number == 1 else door.options
            here.pass_once()
            exchange(peer, b"after")
        assert [door.audited()["verdict"] for _ in range(4)] == ["accepted", "active"] * 2
        ends(here, peer, 3)


@pytest.mark.parametrize("into", ["auto", "accept"])
def test_an_unmodified_program_of_that_user_gets_a_connection(into: str) -> None:
    destination = server("threads", "0.0.0.0", prefix=AS_USER)
    with served(server("threads", "0.0.0.0"), destination) as (here, peer), \
            UsersDoor(here, RULES, USER) as door:
        way = f"accept:{here.nodes['destination'].process.pid}" if into == "accept" else into
        here.pass_once("--into", way, *SEEN)
        told = door.audited()
        assert (told["verdict"], told["user"], "executable" in told) == ("accepted", str(UID), True)
        exchange(peer, b"after")
        finish(here, peer)


def test_serve_has_two_capabilities_and_no_way_to_more() -> None:
    with conversation(register=False, destination_options=("--user", str(UID))) as (here, peer), \
            UsersDoor(here, RULES, USER):
        exchange(peer, b"before")
        attempt = Attempt(here, "origin:send commit")
        (serve,) = attempt.find("tcpcp-serve")
        status = dict(re.findall(r"^(\w+):\t(.*)$", Path(f"/proc/{serve}/status").read_text(), re.MULTILINE))
        two = f"{1 << CAP_NET_ADMIN | 1 << CAP_NET_RAW:016x}"
        assert {status[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {two}
        assert (set(status["Uid"].split()), set(status["Gid"].split())) == ({str(UID)}, {str(GID)})
        assert status["NoNewPrivs"] == "1"
        may_go_first = "Max realtime priority     1 " in Path(f"/proc/{serve}/limits").read_text()
        assert os.sched_getscheduler(serve) == (os.SCHED_RR if may_go_first else os.SCHED_OTHER)
        attempt.go_on()
        report = attempt.outcome()
        assert report is not None
        assert (report["owner"], report["left"]) == ("destination", [])
        here.owner = here.lab.destination
        exchange(peer, b"after")
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        ends(here, peer, 1)


@pytest.mark.parametrize(("capabilities", "complaint"), [
    ("-all,+net_raw", "nftables"), ("-all,+net_admin", r"socket\(SOCK_RAW\)")])
def test_it_needs_both(capabilities: str, complaint: str) -> None:
    with conversation(register=False, captured=False, destination_options=("--user", str(UID))) as (here, peer), \
            UsersDoor(here, RULES, USER, capabilities=capabilities):
        exchange(peer, b"before")
        done = here.owner.run(here.pass_argv(), check=False)
        report = json.loads(done.stdout)
        assert (report["exit"], report["owner"]) == (3, "origin")
        assert re.match(f"{complaint}.*: Operation not permitted", report["error"]), report
        exchange(peer, b"still there")


def test_the_kernel_keeps_it_from_the_programs_of_others() -> None:
    """Whatever the policy says."""
    anything = changed(users="any", ports="any")
    with served(server("threads", "0.0.0.0"), server("threads", "0.0.0.0"), captured=False) as (here, peer), \
            UsersDoor(here, anything, USER):
        roots = here.nodes["destination"].process.pid
        for into, complaint in (("listen:9000", "may not be seen"), (f"accept:{roots}", "may not be"),
                                (f"pid:{roots}", "may not be"), (f"pid:{roots}:0", "may not be")):
            report = json.loads(here.owner.run(here.pass_argv("--into", into), check=False).stdout)
            assert (report["exit"], report["owner"]) == (3, "origin")
            assert complaint in report["error"], (into, report["error"])
        exchange(peer, b"still there")


def test_check_says_what_the_other_host_can_do_through_the_door() -> None:
    with conversation(register=False, captured=False) as (here, _peer), \
            UsersDoor(here, RULES, USER) as door:
        said = here.lab.origin.run([COMMAND, "check", *door.options]).stdout
        _, _, theirs = said.partition(": criu-tcpcp ")
        assert theirs.count("  ok  ") == 9
        assert "  lack  grace-period: " in theirs
        assert theirs.endswith("Looks good.\n")


def test_an_interrupted_pass_is_settled_by_another_serve() -> None:
    with conversation(register=False, destination_options=("--user", str(UID))) as (here, peer), \
            UsersDoor(here, RULES, USER):
        exchange(peer, b"before")
        attempt = Attempt(here, "origin:redirect")
        attempt.kill("command", "keeper", "serve")
        settled = json.loads(here.lab.origin.run([COMMAND, "resolve", "--json"]).stdout)
        assert (settled["owner"], settled["exit"]) == ("destination", 0)
        here.owner = here.lab.destination
        exchange(peer, b"after")
        until(lambda: not attempt.find("tcpcp-serve"), "serve to end", every_s=0.02)
        ends(here, peer, 1, loss_free=False)
