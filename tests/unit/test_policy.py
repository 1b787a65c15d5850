"""The policy of a guarded door: what it allows, which is what somebody wrote down and nothing else."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import pwd
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_tcpcp import policy
from criu_tcpcp.core.endpoint import Endpoint, Flow, Protocol
from criu_tcpcp.core.errors import Refused
from criu_tcpcp.core.policy import NO_PORT, Policy, Rule, Taker, from_document

DOOR = Path(__file__).parents[2] / "docs" / "door.md"
FLOW = Flow(Endpoint(ipaddress.ip_address("10.77.2.11"), 9000), Endpoint(ipaddress.ip_address("10.77.1.2"), 40000))
TAKER = Taker(frozenset({33}), "/usr/sbin/nginx", 9000)
RULE: dict[str, Any] = {"keys": ["web1"], "local": ["10.77.2.0/24"], "local-ports": [9000], "peers": ["10.77.1.0/24"],
                        "peer-ports": ["1024-65535"], "users": [33], "executables": ["/usr/sbin/nginx"],
                        "ports": ["9000-9010"], "limit": 3}


def read(**rules: Any) -> Policy:
    return from_document({"allow": rules}, lambda name: pwd.getpwnam(name).pw_uid, lambda path: path)


def allows(rules: Policy, key: str = "web1", flow: Flow = FLOW, taker: Taker = TAKER) -> bool:
    return bool(rules.allowing(key, flow, [taker]))


def test_a_rule_allows_what_it_names() -> None:
    assert allows(read(a=RULE))
    assert allows(read(other={**RULE, "keys": ["web2"]}, a=RULE))


def test_udp_is_allowed_only_where_a_rule_says_so() -> None:
    flow = replace(FLOW, protocol=Protocol.UDP)
    assert not allows(read(a=RULE), flow=flow)
    assert read(a=RULE).why_denied("web1", flow, [TAKER]) == "rule a does not allow the protocol udp"
    assert allows(read(a={**RULE, "protocols": ["udp"]}), flow=flow)
    assert not allows(read(a={**RULE, "protocols": ["udp"]}))
    for both in (["tcp", "udp"], "any"):
        assert allows(read(a={**RULE, "protocols": both}), flow=flow)
        assert allows(read(a={**RULE, "protocols": both}))


#: field -> a value of it that does not allow the pass
OTHERS: dict[str, Any] = {"keys": ["web2"], "local": ["10.77.3.0/24", "2001:db8::/32"], "local-ports": [9001],
                          "peers": ["10.77.1.3"], "peer-ports": [40001, "1-39999"], "users": [0, 34],
                          "executables": ["/usr/sbin/nginx2"], "ports": ["9001-9010"]}


@pytest.mark.parametrize("field", OTHERS)
def test_each_field_denies_and_the_audit_names_it(field: str) -> None:
    rules = read(a={**RULE, field: OTHERS[field]})
    assert not allows(rules)
    told = rules.why_denied("web1", FLOW, [TAKER])
    what = {"keys": "the key web1", "local": "the local address 10.77.2.11", "local-ports": "the local port 9000",
            "peers": "the peer 10.77.1.2", "peer-ports": "the peer's port 40000",
            "users": "the user 33 of the program", "executables": "the executable /usr/sbin/nginx",
            "ports": "a program at the port 9000"}[field]
    assert told == f"rule a does not allow {what}"
    if field != "keys":
        assert allows(read(a={**RULE, field: "any"}))


def test_a_program_must_be_allowed_in_all_that_it_acts_as() -> None:
    assert not allows(read(a=RULE), taker=dataclasses.replace(TAKER, users=frozenset({33, 0})))
    assert allows(read(a={**RULE, "users": [33, 0]}), taker=dataclasses.replace(TAKER, users=frozenset({33, 0})))


@pytest.mark.parametrize("unknown", [{"users": frozenset()}, {"executable": ""}, {"port": NO_PORT}], ids=str)
def test_what_cannot_be_told_is_allowed_by_any_alone(unknown: dict[str, Any]) -> None:
    taker = dataclasses.replace(TAKER, **unknown)
    assert not allows(read(a=RULE), taker=taker)
    field = {"users": "users", "executable": "executables", "port": "ports"}[next(iter(unknown))]
    assert allows(read(a={**RULE, field: "any"}), taker=taker)


def test_no_rule_allows_nothing() -> None:
    assert not allows(read())
    assert not allows(read(a=RULE), key="web10")
    assert not read(a=RULE).allowing("web1", FLOW, [])
    assert read().why_denied("web1", FLOW, [TAKER]) == "there is no rule"


# -- of all policies ---------------------------------------------------------------------------------------------------

PORTS = st.none() | st.lists(st.builds(lambda one, more: range(one, min(65536, one + more)), st.integers(1, 65535),
                                       st.integers(1, 40000)), min_size=1, max_size=3).map(tuple)
NETWORKS = st.none() | st.lists(st.sampled_from([ipaddress.ip_network(text) for text in (
    "10.77.0.0/16", "10.77.1.0/24", "10.77.2.11", "0.0.0.0/0", "::/0", "2001:db8::/32")]), min_size=1).map(tuple)
KEYS, USERS, FILES = ("web1", "web2"), (0, 33, 34), ("/bin/a", "/bin/b")
RULES = st.builds(Rule, st.sampled_from("abc"), st.frozensets(st.sampled_from(KEYS), min_size=1), NETWORKS, PORTS,
                  NETWORKS, PORTS, st.none() | st.frozensets(st.sampled_from(USERS), min_size=1),
                  st.none() | st.frozensets(st.sampled_from(FILES), min_size=1), PORTS, st.integers(1, 9))
POLICIES = st.lists(RULES, max_size=4).map(lambda rules: Policy("/dev/log", tuple(rules)))
V4 = [ipaddress.ip_address(text) for text in ("10.77.2.11", "10.77.1.2", "192.0.2.1")]
V6 = [ipaddress.ip_address(text) for text in ("2001:db8::1", "fd00::1")]
NUMBERS = st.integers(1, 65535)
FLOWS = st.one_of(*(st.builds(lambda a, p, b, q: Flow(Endpoint(a, p), Endpoint(b, q)), st.sampled_from(one), NUMBERS,
                              st.sampled_from(one), NUMBERS) for one in (V4, V6)))
TAKERS = st.builds(Taker, st.frozensets(st.sampled_from(USERS)), st.sampled_from(["", *FILES, "/bin/c"]),
                   st.integers(0, 65535))
QUESTIONS = st.tuples(st.sampled_from([*KEYS, "web3"]), FLOWS, st.lists(TAKERS, max_size=2))


@given(POLICIES, QUESTIONS, st.integers(0, 3))
def test_without_a_rule_nothing_more_is_allowed(rules: Policy, question: tuple[str, Flow, list[Taker]],
                                                left_out: int) -> None:
    fewer = Policy(rules.audit, rules.rules[:left_out] + rules.rules[left_out + 1:])
    assert set(fewer.allowing(*question)) <= set(rules.allowing(*question))


@given(POLICIES, QUESTIONS)
def test_what_is_not_known_yet_is_never_denied_and_allowed_later(rules: Policy,
                                                                 question: tuple[str, Flow, list[Taker]]) -> None:
    key, flow, takers = question
    for field in ("users", "executable", "port"):
        vaguer = [dataclasses.replace(one, **{field: None}) for one in takers]
        assert set(rules.allowing(key, flow, takers)) <= set(rules.allowing(key, flow, vaguer))


@given(POLICIES, QUESTIONS)
def test_a_denial_has_a_reason_and_only_a_denial(rules: Policy, question: tuple[str, Flow, list[Taker]]) -> None:
    if not rules.allowing(*question):
        assert rules.why_denied(*question)
    for rule in rules.allowing(*question):
        assert question[0] in rule.keys


def test_the_example_of_the_document_is_a_policy_that_allows_what_it_says() -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```$", DOOR.read_text(), re.MULTILINE | re.DOTALL)
    found = from_document(tomllib.loads(text), {"redis": 110}.__getitem__, lambda path: path)
    flow = Flow(Endpoint(ipaddress.ip_address("192.0.2.10"), 6379),
                Endpoint(ipaddress.ip_address("198.51.100.7"), 40112))
    redis = Taker(frozenset({110}), "/usr/bin/redis-server", 6379)
    assert [rule.name for rule in found.allowing("web1", flow, [redis])] == ["sessions"]
    assert not found.allowing("web3", flow, [redis])


# -- the file ----------------------------------------------------------------------------------------------------------

TEXT = """
audit = "/var/log/door"
[allow.sessions]
keys = ["web1", "web-2"]
local = ["10.77.2.0/24"]
local-ports = [9000]
peers = "any"
peer-ports = ["1024-65535"]
users = ["root", 33]
executables = ["/bin/sh"]
ports = [9000, "9100-9200"]
limit = 20
"""


def test_a_file_is_read() -> None:
    found = policy.parse(TEXT.encode())
    (rule,) = found.rules
    assert (found.audit, rule.name, rule.limit) == ("/var/log/door", "sessions", 20)
    assert (rule.keys, rule.peers, rule.users) == ({"web1", "web-2"}, None, {0, 33})
    assert rule.executables == {str(Path("/bin/sh").resolve())}
    assert rule.ports == (range(9000, 9001), range(9100, 9201))


@pytest.mark.parametrize(("old", "new", "complaint"), [
    ("limit = 20", "", "allow.sessions: 'limit' is missing"),
    ("limit = 20", "limit = 0", "allow.sessions.limit: 0 is not a number of connections"),
    ("limit = 20", "limit = true", "allow.sessions.limit: True is not a number of connections"),
    ("limit = 20", 'limit = 20\nprotocols = ["sctp"]', "allow.sessions.protocols: 'sctp' is not a protocol"),
    ("limit = 20", "limit = 20\nlimits = 3", "allow.sessions: 'limits' is no field of a rule"),
    ("[allow.sessions]", "[deny.sessions]", "'deny': there is no such field"),
    ("[allow.sessions]", '[allow."a b"]', "allow: 'a b' is not a name"),
    ('"web-2"', '"we b"', "allow.sessions.keys: 'we b' is not a name"),
    ('keys = ["web1", "web-2"]', 'keys = "any"', "allow.sessions.keys: keys have to be named"),
    ("local-ports = [9000]", "local-ports = []", "allow.sessions.local-ports: a list of one or more"),
    ("local-ports = [9000]", "local-ports = 9000", "allow.sessions.local-ports: a list of one or more"),
    ("10.77.2.0/24", "10.77.2.1/24", "allow.sessions.local: '10.77.2.1/24' is not a network"),
    ("1024-65535", "1024-65536", "allow.sessions.peer-ports: '1024-65536' is not a port"),
    ("1024-65535", "2-1", "allow.sessions.peer-ports: '2-1' is not a port"),
    ("1024-65535", "any", "allow.sessions.peer-ports: 'any' is not a port"),
    ('"root"', '"nobody-of-that-name"', "allow.sessions.users: there is no user 'nobody-of-that-name'"),
    ("/bin/sh", "bin/sh", "allow.sessions.executables: 'bin/sh' is not the path of an executable here"),
    ("/bin/sh", "/bin/none", "allow.sessions.executables: '/bin/none' is not the path of an executable here"),
    ("/var/log/door", "log", "audit: 'log' is not the absolute path"),
    ("limit = 20", "limit 20", "it is not TOML: Expected '=' after a key in a key/value pair (at line 12, column 7)"),
])
def test_a_mistake_is_one_line_that_names_the_place(old: str, new: str, complaint: str) -> None:
    assert old in TEXT
    with pytest.raises(Refused) as raised:
        policy.parse(TEXT.replace(old, new).encode())
    assert raised.value.message.startswith(complaint)
    assert "\n" not in str(raised.value)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(
    ["any", "web1", "10.0.0.0/8", "1-2", "root", "/bin/sh"])
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.sampled_from([*RULE, "audit", "allow", "x"]), inner, max_size=9))


@given(st.dictionaries(st.sampled_from(["audit", "allow", "x"]), VALUES, max_size=3)
       | st.fixed_dictionaries({"allow": st.dictionaries(st.text(max_size=5), st.fixed_dictionaries(
           {name: VALUES | st.just(value) for name, value in RULE.items()}), max_size=2)}))
def test_whatever_the_document_is_it_is_a_policy_or_refused(document: dict[str, Any]) -> None:
    def uid_of(name: str) -> int:
        raise ValueError(name)
    said = ""
    try:
        from_document(document, uid_of, lambda path: path)
    except Refused as error:
        said = str(error)
    assert "\n" not in said


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_whatever_the_bytes_are_they_are_a_policy_or_refused(text: bytes) -> None:
    said = ""
    try:
        assert policy.parse(text).rules == ()
    except Refused as error:
        said = str(error)
    assert "\n" not in said


@pytest.mark.parametrize("text", [b"a = " + b"[" * 60000, b"a = " + b"{a=" * 20000, b"a." * 32000 + b"b = 1",
                                  b"a = " + b"[\n" * 30000, b"".join(b"a." * 500 + b"b%d = 1\n" % n for n in range(64)),
                                  b"a = " + b"9" * 60000, b"a = 2026-99-99"], ids=lambda text: str(text[:9]))
def test_what_is_made_to_exhaust_is_refused(text: bytes) -> None:
    assert len(text) <= policy.LIMIT
    with pytest.raises(Refused):
        policy.parse(text)


@pytest.mark.root
def test_a_file_that_others_could_have_written_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(TEXT)
    path.chmod(0o644)
    assert policy.read(str(path)).rules
    link = tmp_path / "link"
    link.symlink_to(path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)

    def complaint(where: Path) -> str:
        with pytest.raises(Refused) as raised:
            policy.read(str(where))
        prefix = f"the policy {where} cannot be used: "
        assert raised.value.message.startswith(prefix)
        return raised.value.message.removeprefix(prefix)

    assert complaint(link) == "open: Too many levels of symbolic links"
    assert complaint(fifo) == "it is no regular file"
    assert complaint(tmp_path) == "it is no regular file"
    assert complaint(tmp_path / "none") == "open: No such file or directory"
    for mode in (0o664, 0o646, 0o666):
        path.chmod(mode)
        assert complaint(path) == "others than root may write to it"
    path.chmod(0o644)
    os.chown(path, 65534, 0)
    assert complaint(path) == "it belongs to user 65534, not to root"
    os.chown(path, 0, 0)
    path.write_bytes(b"#" * (policy.LIMIT + 1))
    assert complaint(path) == f"it has {policy.LIMIT + 1} bytes: at most {policy.LIMIT} are read"
