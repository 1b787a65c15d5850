"""What /proc tells is the kernel's word, whatever a process calls itself and its files."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from criu_tcpcp.kernel import process

#: Bytes that Python takes for the end of a line, in text or in a file that is opened as text.
ENDINGS = ["\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028"]
_PR_SET_NAME = 15


@contextlib.contextmanager
def a_process(program: str, *words: str) -> Iterator[int]:
    """A child that has done this, until the end of the block."""
    child = subprocess.Popen([sys.executable, "-c", f"import ctypes, os, socket, sys\n{program}\n"
                              "print(flush=True); sys.stdin.read()", *words],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        yield child.pid
        child.stdin.close()


@pytest.mark.parametrize("ending", ENDINGS, ids=ascii)
def test_a_process_cannot_claim_a_tracer_by_its_name(ending: str) -> None:
    name = f"{ending}TracerPid:\t7"
    assert len(name.encode()) < 16
    with a_process(f"ctypes.CDLL(None).prctl({_PR_SET_NAME}, sys.argv[1].encode(), 0, 0, 0)", name) as pid:
        assert Path(f"/proc/{pid}/comm").read_bytes() == name.encode() + b"\n"
        assert process.tracer_of(pid) == 0
        assert process.name(pid).endswith("TracerPid:?7")


@pytest.mark.parametrize("ending", ENDINGS, ids=ascii)
def test_a_process_cannot_claim_a_vdso_by_a_files_name(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{ending}10-20 r-xp 0 00:00 0 [vdso]"
    path.write_bytes(bytes(mmap.PAGESIZE))
    begin, end = process.mapping(os.getpid(), "[vdso]")
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
        try:
            assert b"10-20 r-xp 0 00:00 0 [vdso]" in Path("/proc/self/maps").read_bytes()
            assert process.mapping(os.getpid(), "[vdso]") == (begin, end) != (0x10, 0x20)
        finally:
            mapped.close()


@pytest.mark.parametrize("name", ["a) R 1 1", "(", ")", "\n", "a b c"])
def test_a_name_does_not_move_the_fields_behind_it(name: str) -> None:
    with a_process(f"ctypes.CDLL(None).prctl({_PR_SET_NAME}, sys.argv[1].encode(), 0, 0, 0)", name) as pid:
        assert process.parent(pid) == os.getpid()
        assert process.is_alive(process.identity(pid))


def test_who_listens_on_unix_is_not_told_by_a_sockets_name(tmp_path: Path) -> None:
    """A row of /proc/net/unix that another user made."""
    with a_process("s = socket.socket(socket.AF_UNIX)", "") as pid, \
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as planted:
        inode = next(number for link in process.descriptors(pid).values()
                     if (number := process.socket_inode(link)) is not None)
        planted.bind(f"\0x\n0: 2 0 10000 1 1 {inode}\nzz zz zz zz zz zz zz zz")
        assert not process.listens_on_unix(pid)
    with a_process("s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()", str(tmp_path / "s")) as pid:
        assert process.listens_on_unix(pid)


@pytest.mark.parametrize("link", ["socket:[]", "socket:[x]", "socket:[-1]", "socket:[1", "/socket:[1]", "pipe:[1]", ""])
def test_what_is_no_socket(link: str) -> None:
    assert process.socket_inode(link) is None
    assert process.socket_inode("socket:[17]") == 17
