"""The way to a target over SSH: the text of the SSH configuration as a list of hops.

paramiko parses the configuration but expands and applies little of it; the rest is here. `resolve` is pure, but for
`Match exec`; `read_config` reads the files that it is given.

Only the link process imports this module, since it needs paramiko.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import pwd
import re
import shlex
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import paramiko

from ..core.errors import LinkError, UsageError
from .target import Target, parse_host

_SYSTEM_CONFIG = "/etc/ssh/ssh_config"
_GLOBAL_KNOWN_HOSTS = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
_USER_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
_DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
_MAX_HOPS = 8
_MAX_INCLUDE_DEPTH = 16  # readconf.c, READCONF_MAX_DEPTH
_FAMILIES = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}


@dataclass(frozen=True)
class Hop:
    """One SSH server on the way, with everything that the configuration says about reaching it.

    `name` is what the user wrote, `host` where it really is; `host_key_alias` what known_hosts calls it, if not by
    host and port. `identity_files` are tried in this order; `identities_only` leaves out what the agent holds beside
    them. `agent` is the agent's socket ("" for none, None for $SSH_AUTH_SOCK).
    """

    name: str
    host: str
    port: int
    user: str
    identity_files: tuple[str, ...]
    required_files: tuple[str, ...] = ()  # of these: named by the target, not by the configuration
    known_hosts: tuple[str, ...] = ()
    host_key_alias: str | None = None
    proxy_command: str | None = None
    connect_timeout_s: float | None = None
    family: int = socket.AF_UNSPEC
    identities_only: bool = False
    agent: str | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}:{self.port}"

    @property
    def known_hosts_name(self) -> str:
        """How known_hosts names it: a port that is not 22 belongs to the name (sshd(8), SSH_KNOWN_HOSTS)."""
        if self.host_key_alias:
            return self.host_key_alias
        return self.host.lower() if self.port == 22 else f"[{self.host.lower()}]:{self.port}"


class _RawConfig(paramiko.SSHConfig):
    """paramiko's parser, with the expansion of everything that HostName does not need left to `_expand`.

    paramiko's own knows neither %% nor what the command line overrides.
    """

    TOKENS_BY_CONFIG_KEY = {  # noqa: RUF012 - the base class's way
        "hostname": ["%h"],
        "match-exec": paramiko.SSHConfig.TOKENS_BY_CONFIG_KEY["match-exec"],
    }


def resolve(target: Target, home: str, config_text: str) -> list[Hop]:
    """The hops to the target, the first to be reached in front. Pure but for `Match exec`.

    A target's identity files and known_hosts hold for the jump hosts too. Raises LinkError for a configuration that
    cannot be read, or that jumps in a circle.
    """
    return _resolve(target, home, config_text, depth=0, jump=None)


def _resolve(target: Target, home: str, config_text: str, depth: int, jump: str | None) -> list[Hop]:
    """`jump` replaces what the configuration says of the way to this host ("" for: directly)."""
    if depth >= _MAX_HOPS:
        raise LinkError(f"SSH configuration: more than {_MAX_HOPS} jump hosts, or a circle of ProxyJump, to {target}")
    local_user = _local_user()
    # The first value obtained counts: what the target says stands before the whole configuration.
    prelude = (f"User {target.user}\n" if target.user else "") + (f"Port {target.port}\n" if target.port else "")
    try:
        options = _RawConfig.from_text(prelude + config_text).lookup(target.host)
        port = int(options.get("port", 22))
        connect_timeout_s = float(options["connecttimeout"]) if "connecttimeout" in options else None
    except (paramiko.SSHException, ValueError, ImportError) as error:
        raise LinkError(f"SSH configuration for {target.host}: {error}") from error
    user = options.get("user", local_user)
    here = socket.gethostname()
    tokens = {"%": "%", "d": home, "h": options["hostname"], "n": target.host, "p": str(port), "r": user}
    tokens |= {"u": local_user, "i": str(os.getuid()), "l": here, "L": here.split(".")[0]}
    tokens["k"] = options.get("hostkeyalias", target.host)

    def files(key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        values = _words(options[key]) if key in options else default
        return tuple(_expand(value, tokens, home) for value in values if value.lower() != "none")

    if "identityfile" in options:
        configured = tuple(_expand(v, tokens, home) for v in options["identityfile"] if v.lower() != "none")
    else:
        configured = () if target.identity_files else tuple(_expand(v, tokens, home) for v in _DEFAULT_KEYS)
    if target.known_hosts is not None:
        known_hosts: tuple[str, ...] = (target.known_hosts,)
    else:
        known_hosts = files("userknownhostsfile", _USER_KNOWN_HOSTS)
        known_hosts += files("globalknownhostsfile", _GLOBAL_KNOWN_HOSTS)
    proxy = next((key for key in options if key in ("proxyjump", "proxycommand")), None)  # the first obtained counts
    jumps = options["proxyjump"] if proxy == "proxyjump" and jump is None else jump or ""
    command = options["proxycommand"] if proxy == "proxycommand" and jump is None else None
    hop = Hop(
        name=target.host,
        host=options["hostname"],
        port=port,
        user=user,
        identity_files=tuple(dict.fromkeys(target.identity_files + configured)),
        required_files=target.identity_files,
        known_hosts=known_hosts,
        host_key_alias=options.get("hostkeyalias"),
        proxy_command=_expand(command, tokens, home) if command else None,
        connect_timeout_s=connect_timeout_s,
        family=_FAMILIES.get(options.get("addressfamily", "any").lower(), socket.AF_UNSPEC),
        identities_only=options.get("identitiesonly", "no").lower() == "yes",
        agent=_agent(options.get("identityagent"), tokens, home),
    )
    if not jumps or jumps.lower() == "none":
        return [hop]
    *before, last = (_expand(text.strip(), tokens, home) for text in jumps.split(","))
    through = _jump_target(last, target)
    return [*_resolve(through, home, config_text, depth + 1, ",".join(before) if before else None), hop]


def _jump_target(text: str, target: Target) -> Target:
    """A jump host as a target of its own, which keeps of the destination's what is not of the destination alone."""
    try:
        jump = parse_host(text.removeprefix("ssh://"))
    except UsageError as error:
        raise LinkError(f"SSH configuration: ProxyJump {text!r} is not [USER@]HOST[:PORT]") from error
    return dataclasses.replace(target, host=jump.host, user=jump.user, port=jump.port)


def _agent(value: str | None, tokens: dict[str, str], home: str) -> str | None:
    if value is None or value == "SSH_AUTH_SOCK":
        return None
    if value.lower() == "none":
        return ""
    return os.environ.get(value[1:], "") if value.startswith("$") else _expand(value, tokens, home)


def _expand(value: str, tokens: dict[str, str], home: str) -> str:
    """ssh_config(5), TOKENS, and a tilde at the front. An unknown token stays as it is."""
    if value == "~" or value.startswith("~/"):
        value = home.replace("%", "%%") + value[1:]
    return re.sub(r"%(.)", lambda match: tokens.get(match[1], match[0]), value)


def _words(value: str) -> list[str]:
    try:
        return shlex.split(value)
    except ValueError:  # a quotation mark that paramiko has taken the partner of
        return value.replace('"', "").split()


def _local_user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def read_config(target: Target, home: str) -> str:
    """The text of the configuration files that hold for the target, with their Include lines replaced by the files.

    After an included file the Host or Match line that the Include stood under is repeated; that a Host line inside of
    it holds only where the outer one does, as in OpenSSH, is not reproduced. Raises LinkError when the target's own
    file cannot be read; the two of ssh's own need not exist.
    """
    if target.ssh_config is not None:
        try:
            return "".join(_included(target.ssh_config, f"{home}/.ssh", home, 0))
        except OSError as error:
            raise LinkError(f"SSH configuration {target.ssh_config}: {error.strerror}") from error
    text = ""
    for path, base in ((f"{home}/.ssh/config", f"{home}/.ssh"), (_SYSTEM_CONFIG, os.path.dirname(_SYSTEM_CONFIG))):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            text += "".join(_included(path, base, home, 0)) + "Host *\n"  # the last block of a file ends with it
    return text


def _included(path: str, base: str, home: str, depth: int) -> Iterator[str]:
    if depth > _MAX_INCLUDE_DEPTH:
        raise LinkError(f"SSH configuration: too many nested Include lines, at {path}")
    block = "Host *"
    for line in Path(path).read_text(errors="replace").splitlines():
        keyword, _, rest = line.strip().replace("=", " ", 1).partition(" ")
        if keyword.lower() in ("host", "match"):
            block = line
        if keyword.lower() != "include":
            yield line + "\n"
            continue
        for pattern in _words(rest):
            for name in sorted(glob.glob(os.path.join(base, _expand(pattern, {}, home)))):
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    yield from _included(name, base, home, depth + 1)
                yield block + "\n"
