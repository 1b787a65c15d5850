"""The policy of a guarded door, read from its file. What is decided by it is core/policy.py."""

from __future__ import annotations

import os
import pwd
import stat
import tomllib
from pathlib import Path

from .core.errors import KernelError, Refused
from .core.policy import Policy, from_document
from .kernel.syscalls import failing

LIMIT = 1 << 16  # bytes
_LONGEST_LINE = 1 << 10  # tomllib takes seconds for a dotted key as long as the whole file
_ROOT = 0


def read(path: str) -> Policy:
    """Refused with one line that names the place, where the file is not root's alone to write, or says what cannot be
    understood: nothing is guessed."""
    try:
        return parse(_text(path))
    except KernelError as error:
        raise Refused(f"the policy {path} cannot be used: {error.message}") from None
    except Refused as error:
        raise Refused(f"the policy {path} cannot be used: {error.message}", hint=error.hint) from None


def _text(path: str) -> bytes:
    with failing("open"):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with failing("read"):
            _check_file(os.fstat(descriptor), path)
            return os.read(descriptor, LIMIT)
    finally:
        os.close(descriptor)


def _check_file(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise Refused("it is no regular file")
    if status.st_uid != _ROOT:
        raise Refused(f"it belongs to user {status.st_uid}, not to root", hint=f"chown root {path}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Refused("others than root may write to it", hint=f"chmod go-w {path}")
    if status.st_size > LIMIT:
        raise Refused(f"it has {status.st_size} bytes: at most {LIMIT} are read")


def parse(text: bytes) -> Policy:
    """Refused for what is no policy."""
    longest = max(map(len, text.split(b"\n")))
    if longest > _LONGEST_LINE:
        raise Refused(f"it has a line of {longest} bytes: at most {_LONGEST_LINE} are read")
    try:
        document = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or "nested too deeply"
        raise Refused(f"it is not TOML: {reason[:200]}") from None
    return from_document(document, _uid_of, _path_of)


def _uid_of(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):
        raise ValueError(name) from None


def _path_of(path: str) -> str:
    """Raises ValueError where there is no such file."""
    try:
        return str(Path(path).resolve(strict=True))
    except (OSError, RuntimeError):  # a loop of links
        raise ValueError(path) from None
