"""Everything of the endpoint that is not bytes, in whole passes over real SSH: options, clocks, and what is refused."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from attempt import conversation, exchange
from criu_tcpcp.core import tcp
from criu_tcpcp.core.options import VARYING, OptionValue, applying
from criu_tcpcp.kernel import repair, sockopt, syscalls, tcpinfo
from criu_tcpcp.lab import Host
from world import PORT, World

pytestmark = pytest.mark.root

REFUSED = 3
#: Some that a program may well set, all at once; those that would keep the peer's packets out, or that exclude each
#: other, are tried one by one in tests/netns/test_kernel_repair.py.
SET: dict[str, OptionValue] = {
    "SO_MARK": 0x70, "SO_PRIORITY": 5, "SO_RCVTIMEO": (3, 500000), "SO_SNDTIMEO": (4, 0), "SO_LINGER": (1, 9),
    "SO_OOBINLINE": 1, "SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 111, "TCP_KEEPINTVL": 22, "TCP_KEEPCNT": 3, "SO_REUSEPORT": 1,
    "SO_BROADCAST": 1, "SO_NO_CHECK": 1, "SO_DEBUG": 1, "SO_TIMESTAMPNS": 1, "SO_TIMESTAMPING": (0x18, 0),
    "SO_TXTIME": (1, 1), "SO_SELECT_ERR_QUEUE": 1, "SO_MAX_PACING_RATE": 12345678901, "SO_TXREHASH": 0,
    "SO_BUSY_POLL": 50, "SO_PREFER_BUSY_POLL": 1, "TCP_CONGESTION": "reno", "TCP_NODELAY": 0, "TCP_SYNCNT": 3,
    "TCP_LINGER2": 17, "TCP_THIN_LINEAR_TIMEOUTS": 1, "TCP_USER_TIMEOUT": 60000, "TCP_NOTSENT_LOWAT": 16384,
    "TCP_INQ": 1, "TCP_RTO_MAX_MS": 50000, "TCP_RTO_MIN_US": 100000, "TCP_DELACK_MAX_US": 100000, "IP_FREEBIND": 1,
    "IP_RECVERR": 1, "IP_BIND_ADDRESS_NO_PORT": 1, "IP_PKTINFO": 1, "IP_RECVTTL": 1, "IP_RECVTOS": 1,
    "IP_MTU_DISCOVER": 2, "IPV6_MTU_DISCOVER": 2, "IPV6_RECVERR": 1, "IPV6_AUTOFLOWLABEL": 0, "IPV6_RECVPKTINFO": 1,
    "IPV6_RECVHOPLIMIT": 1, "IPV6_RECVTCLASS": 1, "IPV6_FLOWINFO": 1, "IPV6_2292PKTINFO": 1, "IPV6_2292HOPLIMIT": 1,
    "SO_ATTACH_FILTER": "06000000ffff0000", "SO_LOCK_FILTER": 1, "SO_SNDBUF": 200000, "SO_RCVBUF": 240000}


#: The kernel changes them, or a bind to an IPv6 address sets it (net/ipv6/af_inet6.c, __inet6_bind).
APART = VARYING | {"IPV6_V6ONLY"}


@contextlib.contextmanager
def program_socket(here: World) -> Iterator[socket.socket]:
    """The program's own socket, by a copy of its descriptor."""
    pidfd = syscalls.pidfd_open(here.node.process.pid)
    try:
        with syscalls.borrow_socket(pidfd, here.descriptor()) as sock:
            yield sock
    finally:
        os.close(pidfd)


def options_of(here: World) -> dict[str, OptionValue]:
    with program_socket(here) as sock:
        return {name: value for name, value in sockopt.read_all(sock).items() if name not in APART}


@pytest.mark.parametrize(("version", "listen"), [(4, "0.0.0.0"), (6, "::"), (4, "::")], ids=["v4", "v6", "v4-mapped"])
def test_a_socket_comes_with_everything_that_was_set_on_it(version: int, listen: str) -> None:
    """There and back: what one host cannot tell, the other did not set."""
    with conversation(version=version, listen=listen) as (here, peer):
        exchange(peer, b"before")
        with program_socket(here) as sock:
            usual = sockopt.read_all(sock)
            known = {row.name for row in applying(sock.family)} & usual.keys()
            for name in [one for one in SET if one in known]:  # in this order: a locked filter stays as it is
                sockopt.write(sock, name, SET[name])
        wanted = options_of(here)
        assert {name for name in SET.keys() & known - VARYING if wanted[name] != SET[name]} == set()
        assert len([name for name in wanted if wanted[name] != usual[name]]) > 40
        for number in range(2):
            report = here.pass_once()
            assert report["notes"] == []
            assert options_of(here) == wanted, number
            with program_socket(here) as sock:
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == SET["SO_RCVBUF"]
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == SET["SO_SNDBUF"]
            exchange(peer, b"after %d" % number)
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        here.node.wait_for("end")
        here.prove()
        assert here.release() == []


def test_ip_options_go_on_in_every_packet() -> None:
    """Two NOPs and the end of the list: a place for them in every header, and less for data."""
    with conversation(captured=False) as (here, peer):
        exchange(peer, b"before")
        with program_socket(here) as sock:
            sockopt.write(sock, "IP_OPTIONS", "01010000")
        exchange(peer, b"with options")
        with program_socket(here) as sock:
            mss = tcpinfo.read(sock).snd_mss
        here.pass_once()
        assert options_of(here)["IP_OPTIONS"] == "01010000"
        with program_socket(here) as sock:
            assert tcpinfo.read(sock).snd_mss == mss
        exchange(peer, b"after" * 2000)


def test_the_signals_of_a_descriptor_stay_behind_and_the_report_says_so() -> None:
    """Whoever is told at the destination might die of it."""
    with conversation(captured=False) as (here, peer):
        with program_socket(here) as sock:
            fcntl.fcntl(sock, fcntl.F_SETFL, fcntl.fcntl(sock, fcntl.F_GETFL) | os.O_ASYNC)  # and nobody is told
        exchange(peer, b"before")
        (note,) = here.pass_once()["notes"]
        assert "O_ASYNC" in note
        with program_socket(here) as sock:
            assert not fcntl.fcntl(sock, fcntl.F_GETFL) & os.O_ASYNC
        exchange(peer, b"after")


# -- refused by name ---------------------------------------------------------------------------------------------------

def refused(here: World, *options: str) -> dict[str, Any]:
    """What `pass` says, and `pass --dry-run` too; nothing was touched."""
    before = [here.left_at(host) for host in (here.lab.origin, here.lab.destination)]
    said = []
    for more in ((), ("--dry-run",)):
        done = here.owner.run([*here.pass_argv(*options), *more], check=False)
        answer = json.loads(done.stdout)
        assert (done.returncode, answer["exit"], answer["owner"]) == (REFUSED, REFUSED, "origin"), done
        assert not answer.get("steps")
        said.append((answer["refusal"], answer["hint"]))
    assert said[0] == said[1]
    assert [here.left_at(host) for host in (here.lab.origin, here.lab.destination)] == before
    return dict(answer)


def listed_as(here: World) -> set[str | None]:
    """The names of what forbids the pass of the program's connections."""
    rows = map(json.loads, here.listed("--json").splitlines())
    return {row["refusal"] for row in rows if row["peer"]}


def set_for(host: Host, name: str, value: int) -> None:
    host.run(["sh", "-c", f"echo {value} >/proc/sys/net/{name}"])


def test_ecn_is_refused_and_passed_without_it_where_that_is_wanted() -> None:
    with contextlib.ExitStack() as stack:
        here, peer = stack.enter_context(conversation(captured=False))
        peer.close()
        set_for(here.lab.peer, "ipv4/tcp_ecn", 1)
        with here.lab.peer.enter():
            again = stack.enter_context(socket.create_connection((str(here.lab.origin.ipv4), PORT), timeout=20))
        here.knows_peer(again.getsockname()[1])
        here.node.wait_for("serving", 2)
        exchange(again, b"before")
        assert listed_as(here) == {"ecn"}
        assert refused(here)["refusal"] == "ecn"
        assert here.pass_once("--ecn-anyway")["owner"] == "destination"
        exchange(again, b"after")


@pytest.mark.parametrize("version", [4, 6])
def test_a_program_that_wants_near_peers_gets_no_packets_sent_on(version: int) -> None:
    name = "IP_MINTTL" if version == 4 else "IPV6_MINHOPCOUNT"
    with conversation(version=version, listen="0.0.0.0" if version == 4 else "::", captured=False) as (here, peer):
        with program_socket(here) as sock:
            sockopt.write(sock, name, 32)
        exchange(peer, b"near enough")
        assert refused(here)["refusal"] == "minimal-ttl"
        with program_socket(here) as sock:
            sockopt.write(sock, name, 0)
        here.pass_once()
        exchange(peer, b"after")


def test_a_destination_that_has_the_connection_already() -> None:
    with conversation(captured=False) as (here, peer):
        assert here.flow is not None
        with here.lab.destination.enter(), socket.socket() as other:
            other.setsockopt(socket.IPPROTO_IP, 19, 1)  # IP_TRANSPARENT
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            repair.set_repair(other, repair.REPAIR_ON)
            other.bind((str(here.flow.local.address), here.flow.local.port))
            other.connect((str(here.flow.peer.address), here.flow.peer.port))
            assert refused(here)["refusal"] == "in-use"
        here.pass_once()
        exchange(peer, b"after")


# -- time --------------------------------------------------------------------------------------------------------------

def test_a_clock_of_microseconds_goes_on_at_the_destination(capability: Callable[[str, bool], None]) -> None:
    """The route at the origin says so (`features tcp_usec_ts`), and none does at the destination."""
    capability("microsecond timestamps", repair.has_usec_timestamps())
    with contextlib.ExitStack() as stack:
        here, peer = stack.enter_context(conversation())
        peer.close()
        with here.lab.origin.enter():
            count_in_microseconds_towards(str(here.lab.peer.ipv4))
        with here.lab.peer.enter():
            again = stack.enter_context(socket.create_connection((str(here.lab.origin.ipv4), PORT), timeout=20))
        here.knows_peer(again.getsockname()[1])
        here.node.wait_for("serving", 2)
        exchange(again, b"before")
        for number in range(2):
            with program_socket(here) as sock:
                assert tcpinfo.read(sock).options & tcp.OPT_USEC_TS
            here.pass_once()
            exchange(again, b"after %d" % number)
        with program_socket(here) as sock:
            assert tcpinfo.read(sock).rto_us < 1_000_000
        again.shutdown(socket.SHUT_WR)
        assert again.recv(1) == b""
        here.node.wait_for("end")
        here.prove()
        here.lab.origin.run(["ip", "route", "del", str(here.lab.peer.ipv4)])
        assert here.release() == []


def count_in_microseconds_towards(address: str) -> None:
    """RTAX_FEATURE_TCP_USEC_TS is 16 (linux/rtnetlink.h); ip(8) of Debian 12 does not know it."""
    from pyroute2 import IPRoute
    with IPRoute() as route:
        (way,) = route.route("get", dst=address)
        gateway = {"gateway": way.get_attr("RTA_GATEWAY")} if way.get_attr("RTA_GATEWAY") else {}
        route.route("add", dst=address, dst_len=32, oif=way.get_attr("RTA_OIF"), metrics={"features": 16}, **gateway)


@pytest.mark.parametrize("version", [4, 6])
def test_a_socket_that_is_bound_to_a_device_is_passed_there_and_back(version: int) -> None:
    """What is made here for it comes by the loopback device, and it is to hear that all the same."""
    with conversation(register=False, version=version) as (here, peer):
        exchange(peer, b"before")
        with program_socket(here) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        for _ in range(2):
            here.pass_once()
            with program_socket(here) as sock:
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"eth0"
            exchange(peer, b"after")
        peer.close()
        here.node.wait_for("end")
        here.prove()
        assert here.release() == []
