"""Where one side of a pass works: to get there, and to find it again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from criu_tcpcp import namespaces
from criu_tcpcp.core.errors import Refused
from criu_tcpcp.kernel import netns

pytestmark = pytest.mark.root


@contextmanager
def elsewhere() -> Iterator[int]:
    """A process in a network namespace of its own."""
    argv = ["unshare", "--net", "sh", "-c", "echo ready; exec sleep 1000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def found(wanted: tuple[int, int]) -> bool:
    descriptor = netns.find(wanted)
    if descriptor is None:
        return False
    with netns.enter(descriptor):
        assert netns.own() == wanted
    os.close(descriptor)
    return True


def test_a_namespace_is_found_by_whatever_keeps_it_and_not_once_it_has_gone(tmp_path: Path) -> None:
    assert found(netns.own())
    place = tmp_path / "a place"
    place.touch()
    with elsewhere() as pid:
        wanted = netns.identity(f"/proc/{pid}/ns/net")
        assert found(wanted)
        subprocess.run(["mount", "--bind", f"/proc/{pid}/ns/net", place], check=True)
    try:
        assert found(wanted)
    finally:
        subprocess.run(["umount", place], check=True)
    assert not found(wanted)


def test_the_thread_is_where_the_named_program_is_and_back_afterwards() -> None:
    home = netns.own()
    with elsewhere() as pid:
        there = netns.identity(f"/proc/{pid}/ns/net")
        for into in (f"accept:{pid}", f"pid:{pid}", f"pid:{pid}:7"):
            with namespaces.of_target(into, guarded=False) as is_other:
                assert (is_other, netns.own()) == (True, there)
            assert netns.own() == home
    for into in (f"accept:{os.getpid()}", "listen:80", "auto", "receiver"):
        with namespaces.of_target(into, guarded=True) as is_other:
            assert (is_other, netns.own()) == (False, home)


def test_a_guarded_door_leads_into_no_other_namespace() -> None:
    with elsewhere() as pid, pytest.raises(Refused, match="this door leads to that of its host only"), \
            namespaces.of_target(f"accept:{pid}", guarded=True):
        pytest.fail("it went in")
    with pytest.raises(Refused, match="there is no process"), namespaces.of_target("pid:999999999", guarded=False):
        pytest.fail("it went in")
