"""Who may pass which connection into which program: the rules, and the decision. Pure; ../policy.py reads the file.

Each rule allows something, none forbids, and what no rule allows is denied: so a rule that is taken away never allows
more. A rule names everything that it allows. "any" has to be said; what is left out is an error, not a permission. Only
two fields may be left out, since rules were written before there were such things: without `protocols` TCP alone is
allowed, without `adopts` no address may move here.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .endpoint import Flow, IPAddress, Protocol
from .errors import Refused

ANY = "any"
DEFAULT_AUDIT = "/dev/log"
NO_PORT = 0  # of a program that waits for its connections at no port
UNKNOWN_EXECUTABLE = ""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_PORTS = range(1, 65536)
_MOST_AT_ONCE = 1 << 20

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Taker:
    """A program that may get the connection. What is not known yet is None, and is not objected to: it is asked about
    again when it is. `users`: all that the process acts as. `executable`: the file, UNKNOWN_EXECUTABLE where that
    cannot be told. `port`: where it waits for connections, or NO_PORT."""

    users: frozenset[int] | None = None
    executable: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class Rule:
    """One permission. None stands for "any". `limit`: connections at once."""

    name: str
    keys: frozenset[str]
    local: tuple[Network, ...] | None
    local_ports: tuple[range, ...] | None
    peers: tuple[Network, ...] | None
    peer_ports: tuple[range, ...] | None
    users: frozenset[int] | None
    executables: frozenset[str] | None
    ports: tuple[range, ...] | None
    limit: int
    protocols: frozenset[Protocol] = frozenset({Protocol.TCP})
    adopts: tuple[Network, ...] | None = ()

    def lets_move(self, address: IPAddress) -> bool:
        """The local address of a connection may come along."""
        return _within(self.adopts, address)

    def objections(self, key: str, flow: Flow, taker: Taker) -> list[str]:
        """What of the question the rule does not allow."""
        found = {f"the key {key}": key in self.keys,
                 f"the protocol {flow.protocol.label}": flow.protocol in self.protocols,
                 f"the local address {flow.local.address}": _within(self.local, flow.local.address),
                 f"the local port {flow.local.port}": _among(self.local_ports, flow.local.port),
                 f"the peer {flow.peer.address}": _within(self.peers, flow.peer.address),
                 f"the peer's port {flow.peer.port}": _among(self.peer_ports, flow.peer.port)}
        if taker.users is not None:
            who = ", ".join(map(str, sorted(taker.users))) or "unknown"
            found[f"the user {who} of the program"] = \
                self.users is None or (bool(taker.users) and taker.users <= self.users)
        if taker.executable is not None:
            found[f"the executable {taker.executable or 'that cannot be told'}"] = \
                self.executables is None or taker.executable in self.executables
        if taker.port is not None:
            where = f"at the port {taker.port}" if taker.port else "that waits at no port"
            found[f"a program {where}"] = _among(self.ports, taker.port)
        return [what for what, is_allowed in found.items() if not is_allowed]


@dataclass(frozen=True)
class Policy:
    """`audit`: where each pass is told of."""

    audit: str
    rules: tuple[Rule, ...] = field(default=())

    def knows(self, key: str) -> bool:
        return any(key in rule.keys for rule in self.rules)

    def allowing(self, key: str, flow: Flow, takers: Iterable[Taker]) -> list[Rule]:
        """The rules that allow this connection into one of these programs; none: it is denied."""
        asked = list(takers)
        return [rule for rule in self.rules if any(not rule.objections(key, flow, taker) for taker in asked)]

    def why_denied(self, key: str, flow: Flow, takers: Iterable[Taker]) -> str:
        """For the administrator: what the rule says that comes closest."""
        told = [(rule.objections(key, flow, taker), rule.name) for rule in self.rules for taker in takers]
        if not told:
            return "there is no rule" if not self.rules else "no program is there to take it"
        objections, name = min(told, key=lambda one: len(one[0]))
        return f"rule {name} does not allow {', nor '.join(objections)}"


def _within(networks: tuple[Network, ...] | None, address: IPAddress) -> bool:
    return networks is None or any(address in one for one in networks)


def _among(ports: tuple[range, ...] | None, port: int) -> bool:
    return ports is None or any(port in one for one in ports)


def check_name(what: str, name: object) -> str:
    """The name of a key or a rule. Refused for one that could be mistaken in a log, or on a command line."""
    if type(name) is not str or not _NAME.fullmatch(name):
        raise Refused(f"{what}: {name!r:.80} is not a name", hint="letters, digits, and . _ @ - behind the first; at "
                      "most 64")
    return name


# -- from a file -------------------------------------------------------------------------------------------------------

def from_document(document: Mapping[str, Any], uid_of: Callable[[str], int], path_of: Callable[[str], str]) -> Policy:
    """The policy that a parsed TOML document says. `uid_of` a user's name, `path_of` what a path leads to: both raise
    ValueError. Refused names the place of the first mistake."""
    audit = document.get("audit", DEFAULT_AUDIT)
    if type(audit) is not str or not audit.startswith("/"):
        raise Refused(f"audit: {audit!r:.80} is not the absolute path of a file, or of a log daemon's socket")
    rules = document.get("allow", {})
    unknown = [name for name in document if name not in ("audit", "allow")]
    if unknown:
        raise Refused(f"{unknown[0]!r:.80}: there is no such field", hint="audit, and rules [allow.NAME]")
    if not isinstance(rules, dict):
        raise Refused("allow: rules are tables", hint="[allow.NAME]")
    return Policy(audit, tuple(_rule(check_name("allow", name), table, uid_of, path_of)
                               for name, table in rules.items()))


def _rule(name: str, table: Any, uid_of: Callable[[str], int], path_of: Callable[[str], str]) -> Rule:
    place = f"allow.{name}"
    if not isinstance(table, dict):
        raise Refused(f"{place}: a rule is a table", hint="[allow.NAME]")
    readers: dict[str, Callable[[str, Any], Any]] = {
        "keys": _key, "local": _network, "local-ports": _ports, "peers": _network, "peer-ports": _ports,
        "users": lambda place, value: _user(place, value, uid_of),
        "executables": lambda place, value: _executable(place, value, path_of), "ports": _ports}
    optional: dict[str, Callable[[str, Any], Any]] = {"protocols": _protocol, "adopts": _network}
    for field_name in [*(one for one in table if one not in (*readers, *optional, "limit")),
                       *(one for one in (*readers, "limit") if one not in table)]:
        what = "is no field of a rule" if field_name in table else "is missing"
        raise Refused(f"{place}: {field_name!r:.80} {what}", hint=", ".join((*readers, *optional, "limit")))
    values = {one: _several(f"{place}.{one}", table[one], reader)
              for one, reader in (readers | optional).items() if one in table}
    if values["keys"] is None:
        raise Refused(f"{place}.keys: keys have to be named")
    limit = table["limit"]
    if type(limit) is not int or not 0 < limit <= _MOST_AT_ONCE:
        raise Refused(f"{place}.limit: {limit!r:.80} is not a number of connections (1 to {_MOST_AT_ONCE})")
    return Rule(name, frozenset(values["keys"]), values["local"], values["local-ports"], values["peers"],
                values["peer-ports"], _set(values["users"]), _set(values["executables"]), values["ports"], limit,
                frozenset(values.get("protocols", (Protocol.TCP,)) or Protocol), values.get("adopts", ()))


def _set(values: tuple[Any, ...] | None) -> frozenset[Any] | None:
    return None if values is None else frozenset(values)


def _several(place: str, value: Any, reader: Callable[[str, Any], Any]) -> tuple[Any, ...] | None:
    if value == ANY:
        return None
    if not isinstance(value, list) or not value:
        raise Refused(f'{place}: a list of one or more, or "{ANY}"')
    return tuple(reader(place, one) for one in value)


def _key(place: str, value: Any) -> str:
    return check_name(place, value)


def _protocol(place: str, value: Any) -> Protocol:
    known = {one.label: one for one in Protocol}
    if type(value) is not str or value not in known:
        raise Refused(f"{place}: {value!r:.80} is not a protocol that is passed", hint=", ".join(known))
    return known[value]


def _network(place: str, value: Any) -> Network:
    try:
        if type(value) is not str:
            raise ValueError
        return ipaddress.ip_network(value)
    except ValueError:
        raise Refused(f"{place}: {value!r:.80} is not a network",
                      hint="ADDRESS or ADDRESS/LENGTH, and no bit set behind the length") from None


def _ports(place: str, value: Any) -> range:
    words = [value] if type(value) is int else value.split("-") if type(value) is str and "-" in value else []
    numbers = [int(one) for one in map(str, words) if one.isascii() and one.isdigit() and len(one) < 6]
    if not numbers or len(numbers) != len(words) or len(numbers) > 2 \
            or not all(one in _PORTS for one in numbers) or numbers[0] > numbers[-1]:
        raise Refused(f"{place}: {value!r:.80} is not a port", hint='1 to 65535; or a range, as "9000-9010"')
    return range(numbers[0], numbers[-1] + 1)


def _user(place: str, value: Any, uid_of: Callable[[str], int]) -> int:
    if type(value) is int and 0 <= value < 1 << 32:
        return value
    try:
        if type(value) is not str:
            raise ValueError
        return uid_of(value)
    except ValueError:
        raise Refused(f"{place}: there is no user {value!r:.80}", hint="a name, or a number") from None


def _executable(place: str, value: Any, path_of: Callable[[str], str]) -> str:
    try:
        if type(value) is not str or not value.startswith("/"):
            raise ValueError
        return path_of(value)
    except ValueError:
        raise Refused(f"{place}: {value!r:.80} is not the path of an executable here",
                      hint="an absolute path; links are followed") from None
