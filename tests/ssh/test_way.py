"""The way of a connection's packets is tried before anything is stopped: a destination that would hear nothing of the
connection, or not its full-size packets, is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from attempt import conversation, exchange
from world import World

pytestmark = pytest.mark.root

#: Of the switch: it looks at the connection, not at SSH.
FILTER = ("table bridge narrow {{ chain forward {{ type filter hook forward priority 0; "
          "tcp dport 9000 meta length >= {size} drop; }}; }}")


@contextmanager
def dropping(here: World, size: int) -> Iterator[None]:
    """Packets of the connection with this many bytes, or more, do not come from host to host."""
    here.lab.gateway.run(["nft", "-f", "-"], input=FILTER.format(size=size))
    try:
        yield
    finally:
        here.lab.gateway.run(["nft", "delete table bridge narrow"])


WORDS = {0: "packets of the connection that are sent on to {via} do not come to the destination",
         1000: "packets of 1500 bytes do not come to {via} by way of {via}, smaller ones do"}


@pytest.mark.parametrize("size", WORDS)
@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "pass"])
@pytest.mark.parametrize("version", [4, 6])
def test_a_filter_on_the_way_is_found(version: int, dry: bool, size: int) -> None:
    with conversation(version=version) as (here, peer):
        exchange(peer, b"before")
        with dropping(here, size):
            done = here.owner.run(here.pass_argv(*(["--dry-run"] if dry else []), "--redirect", "forward"), check=False)
        report = json.loads(done.stdout)
        assert (done.returncode, report["owner"]) == (3, "origin")
        assert WORDS[size].format(via=here.lab.destination.address(version)) in report["error"]
        exchange(peer, b"after")
        peer.close()
        here.prove(changes=False, passes=0)
        left = here.release()
        assert left == [], "\n".join(left)


def test_another_address_of_the_destination_that_nobody_has() -> None:
    with conversation() as (here, peer):
        exchange(peer, b"before")
        done = here.owner.run(here.pass_argv("--via", "10.77.2.99", "--redirect", "forward"), check=False)
        assert done.returncode == 3
        assert "do not come to the destination" in json.loads(done.stdout)["error"]
        exchange(peer, b"after")
        here.pass_once()
        exchange(peer, b"passed")


@pytest.mark.parametrize("version", [4, 6])
def test_a_filter_on_the_way_is_no_obstacle_to_what_ssh_carries(version: int) -> None:
    with conversation(version=version) as (here, peer):
        exchange(peer, b"before")
        with dropping(here, 0):
            report = here.pass_once()
            assert report["redirect"].startswith("carry (packets of the connection that are sent on to ")
            exchange(peer, b"after")
            peer.close()
            here.node.wait_for("end")
            left = here.release()
        assert left == [], "\n".join(left)


@pytest.mark.parametrize("version", [4, 6])
def test_what_comes_home_is_passed_though_nothing_is_sent_on(version: int) -> None:
    """The network takes the packets there: only those that were held are lost, and sent again by the peer."""
    with conversation(version=version) as (here, peer):
        exchange(peer, b"before")
        here.pass_once()
        exchange(peer, b"passed")
        with dropping(here, 1000):
            here.pass_once()
        exchange(peer, b"home")
        assert here.owner is here.lab.origin


def test_rules_of_the_origin_that_let_no_knock_out_say_nothing_of_the_connection() -> None:
    with conversation() as (here, peer):
        exchange(peer, b"before")
        rules = "table inet strict { chain output { type filter hook output priority 0; ct state invalid drop; }; }"
        here.lab.origin.run(["nft", "-f", "-"], input=rules)
        here.pass_once()
        exchange(peer, b"passed")
