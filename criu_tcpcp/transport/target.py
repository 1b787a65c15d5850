"""How the other host is reached: what `pass --host` says, and what the journal remembers of it.

A target is plain data: names and paths, never the contents of a key, so that the journal may hold it and `resolve` can
reach the destination again with nothing else. Two kinds exist: `Target` (over SSH) and `LocalTarget` (a command of
this machine, perhaps in another network namespace). `to_json` writes the kind into the object; `target_from_json`
reads both.

Invariant: the paths of a target are absolute. The keeper and `resolve` have working directories of their own.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import UsageError

# What would mean something to a shell that a ProxyCommand is given to; ssh refuses the same (ssh.c, valid_ruser).
_UNSAFE = re.compile(r"""[\s\x00-\x1f'"`$\\;&<>|(){}]""")
_PORTS = range(1, 65536)
_LONGEST_S, _LONGEST_NAME = 86400, 255


@dataclass(frozen=True)
class Target:
    """The destination over SSH. None leaves a value to the SSH configuration, and then to its default.

    `ssh_config`: that file alone, instead of ~/.ssh/config and /etc/ssh/ssh_config. `known_hosts`: that file alone,
    instead of the user's and the system's. `remote_command` is a shell command line; " serve" is appended to it.
    `timeout_s` bounds the whole way from the name to the running command. Raises UsageError for a name that cannot be.
    """

    host: str
    user: str | None = None
    port: int | None = None
    identity_files: tuple[str, ...] = ()
    ssh_config: str | None = None
    known_hosts: str | None = None
    remote_command: str = "criu-tcpcp"
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        _validate_name("host", self.host)
        if self.user is not None:
            _validate_name("user", self.user)
        if self.port is not None and self.port not in _PORTS:
            raise UsageError(f"port {self.port} is not between 1 and 65535")
        if not 0 < self.timeout_s <= _LONGEST_S:
            raise UsageError(f"a time-out of {self.timeout_s} s: more than 0, and at most {_LONGEST_S}")
        if len(self.host) > _LONGEST_NAME or not self.host.isascii():
            raise UsageError(f"--host {self.host[:40]!a}: not the name of a host")
        object.__setattr__(self, "identity_files", tuple(_absolute(path) for path in self.identity_files))
        for name in ("ssh_config", "known_hosts"):
            path = getattr(self, name)
            if path is not None:
                object.__setattr__(self, name, _absolute(path))

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host and self.port else self.host
        return f"{user}{host}:{self.port}" if self.port else f"{user}{host}"

    def to_json(self) -> dict[str, Any]:
        """The target as values that JSON has."""
        return {"kind": "ssh", **dataclasses.asdict(self), "identity_files": list(self.identity_files)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Target:
        """The inverse of `to_json`; raises UsageError for anything else."""
        fields = _fields(cls, "ssh", data)
        fields["identity_files"] = tuple(fields.get("identity_files", ()))
        return cls(**fields)


@dataclass(frozen=True)
class LocalTarget:
    """The destination as a command of this machine: for tests, and for passes between two namespaces of one host.

    `netns` is the path of the network namespace that the command runs in (None: the caller's); `environment` is added
    to the caller's.
    """

    argv: tuple[str, ...]
    netns: str | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.argv:
            raise UsageError("a local target needs a command")

    def __str__(self) -> str:
        return f"this host ({self.netns})" if self.netns else "this host"

    def to_json(self) -> dict[str, Any]:
        """The target as values that JSON has."""
        return {"kind": "local", **dataclasses.asdict(self), "argv": list(self.argv)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LocalTarget:
        """The inverse of `to_json`; raises UsageError for anything else."""
        fields = _fields(cls, "local", data)
        fields["argv"] = tuple(fields.get("argv", ()))
        return cls(**fields)


def target_from_json(data: Mapping[str, Any]) -> Target | LocalTarget:
    """The target of either kind that `to_json` wrote; raises UsageError for anything else."""
    if data.get("kind") == "local":
        return LocalTarget.from_json(data)
    return Target.from_json(data)


def parse_host(text: str) -> Target:
    """`[USER@]HOST[:PORT]` as a target; an IPv6 address stands in brackets, or alone when no port follows.

    Raises UsageError, with the text, for anything else.
    """
    user, at, where = text.rpartition("@")
    port: str | None = None
    if where.startswith("["):
        host, bracket, rest = where[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise UsageError(f"--host {text!r}: an address in brackets is written [ADDRESS] or [ADDRESS]:PORT")
        port = rest[1:] if rest else None
        if not _is_ipv6(host):
            raise UsageError(f"--host {text!r}: {host!r} is not an IPv6 address")
    elif where.count(":") > 1:
        host = where
        if not _is_ipv6(host):
            raise UsageError(f"--host {text!r}: neither HOST:PORT nor an IPv6 address")
    else:
        host, colon, digits = where.partition(":")
        port = digits if colon else None
    if port is not None and not (port.isascii() and port.isdigit() and len(port) < 6 and int(port) in _PORTS):
        raise UsageError(f"--host {text[:80]!r}: {port[:20]!r} is not a port (1 to 65535)")
    if at and not user:
        raise UsageError(f"--host {text!r}: no user before the @")
    return Target(host, user if at else None, None if port is None else int(port))


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _validate_name(what: str, name: str) -> None:
    if not name:
        raise UsageError(f"the {what} is empty")
    if name.startswith("-") or _UNSAFE.search(name):
        raise UsageError(f"{name!r} cannot be the name of a {what}")


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _fields(cls: type[Target] | type[LocalTarget], kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    fields = dict(data)
    if fields.pop("kind", None) != kind:
        raise UsageError(f"not a target of kind {kind}: {data!r}")
    known = {entry.name for entry in dataclasses.fields(cls)}
    required = {"host"} if kind == "ssh" else {"argv"}
    if fields.keys() - known or required - fields.keys() \
            or not all(_FORMS[name](value) for name, value in fields.items()):
        raise UsageError(f"not a target of kind {kind}: {data!r}")
    return fields


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_text_or_none(value: Any) -> bool:
    return value is None or _is_text(value)


#: What `to_json` writes: what holds for each field of a target.
_FORMS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("host", "remote_command"), _is_text),
    **dict.fromkeys(("user", "ssh_config", "known_hosts", "netns"), _is_text_or_none),
    **dict.fromkeys(("identity_files", "argv"), _are_texts),
    "port": lambda value: value is None or type(value) is int, "timeout_s": lambda value: type(value) in (int, float),
    "environment": lambda value: isinstance(value, dict) and all(map(_is_text, (*value, *value.values())))}
