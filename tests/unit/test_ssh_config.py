"""Targets as text and JSON; what becomes of an SSH configuration; who is in known_hosts. Pure: no host is reached."""

from __future__ import annotations

import base64
import hmac
import json
from pathlib import Path
from typing import Any

import pytest

from criu_tcpcp.core.errors import LinkError, UsageError
from criu_tcpcp.transport.known_hosts import judge, known_keys
from criu_tcpcp.transport.ssh_config import Hop, read_config, resolve
from criu_tcpcp.transport.target import LocalTarget, Target, parse_host, target_from_json

HOME = "/home/someone"
KEY = base64.b64encode(b"a public key").decode()
OTHER = base64.b64encode(b"another one").decode()


@pytest.mark.parametrize(
    ("text", "user", "host", "port"),
    [
        ("dest", None, "dest", None),
        ("root@dest", "root", "dest", None),
        ("root@dest:2222", "root", "dest", 2222),
        ("a@b@dest", "a@b", "dest", None),
        ("192.0.2.7:22", None, "192.0.2.7", 22),
        ("fd00::1", None, "fd00::1", None),
        ("root@fe80::1%eth0", "root", "fe80::1%eth0", None),
        ("[fd00::1]", None, "fd00::1", None),
        ("root@[fd00::1]:22", "root", "fd00::1", 22),
    ],
)
def test_parse_host(text: str, user: str | None, host: str, port: int | None) -> None:
    target = parse_host(text)
    assert (target.user, target.host, target.port) == (user, host, port)
    assert parse_host(str(target)) == target


@pytest.mark.parametrize(
    "text",
    ["", "@dest", "root@", "dest:", "dest:0", "dest:65536", "dest:ssh", "dest:²", "dest:22:22", "[fd00::1",
     "[fd00::1]22", "[dest]:22", "-oProxyCommand=x", "a b", "dest;reboot", "$(x)@dest", "-x@dest", "dest\n"],
)  # fmt: skip
def test_parse_host_refuses(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_host(text)
    assert "\n" not in str(caught.value)


def test_target_survives_the_journal() -> None:
    target = Target("dest", "root", 22, ("/k/one", "/k/two"), "/c", "/h", "sudo criu-tcpcp", 2.5)
    local = LocalTarget(("criu-tcpcp", "serve"), "/run/netns/dest", {"CRIU_TCPCP_RUN_DIR": "/run/dest"})
    for one in (target, local, Target("dest")):
        assert target_from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize("data", [
    {}, {"kind": "ssh"}, {"kind": "local"}, {"kind": "ssh", "host": "h", "key": "x"}, {"kind": "ssh", "host": 1},
    {"kind": "ssh", "host": "h", "port": "22"}, {"kind": "ssh", "host": "h", "port": True},
    {"kind": "ssh", "host": "h", "identity_files": "key"}, {"kind": "ssh", "host": "h", "identity_files": [1]},
    {"kind": "ssh", "host": "h", "ssh_config": 1}, {"kind": "ssh", "host": "h", "ssh_config": "a\0b"},
    {"kind": "ssh", "host": "h", "timeout_s": "1"}, {"kind": "ssh", "host": "h", "timeout_s": None},
    {"kind": "ssh", "host": "h", "remote_command": None}, {"kind": "local", "argv": "serve"},
    {"kind": "local", "argv": [None]}, {"kind": "local", "argv": ["x"], "environment": {"a": 1}}], ids=str)
def test_other_json_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        target_from_json(data)


def test_paths_of_a_target_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = Target("dest", identity_files=("key",), ssh_config="config", known_hosts="known")
    assert target.identity_files == (f"{tmp_path}/key",)
    assert (target.ssh_config, target.known_hosts) == (f"{tmp_path}/config", f"{tmp_path}/known")


def hops(target: Target, config: str) -> list[Hop]:
    return resolve(target, HOME, config)


def test_without_configuration() -> None:
    (hop,) = hops(Target("dest", "root"), "")
    assert (hop.host, hop.port, hop.user) == ("dest", 22, "root")
    assert hop.identity_files == tuple(f"{HOME}/.ssh/id_{kind}" for kind in ("ed25519", "ecdsa", "rsa"))
    assert hop.known_hosts[0] == f"{HOME}/.ssh/known_hosts"
    assert "/etc/ssh/ssh_known_hosts" in hop.known_hosts


def test_configuration_of_a_host() -> None:
    config = """
    Host dest
        HostName %h.example.org
        User admin
        Port 2200
        IdentityFile ~/keys/%r@%n
        IdentityFile /keys/100%%
        UserKnownHostsFile ~/kh1 /kh2
        GlobalKnownHostsFile none
        HostKeyAlias the-dest
        ConnectTimeout 3
        AddressFamily inet6
        IdentitiesOnly yes
        IdentityAgent ~/agent.sock
    Host *
        User nobody
    """
    (hop,) = hops(Target("dest"), config)
    assert (hop.name, hop.host, hop.user, hop.port) == ("dest", "dest.example.org", "admin", 2200)
    assert hop.identity_files == (f"{HOME}/keys/admin@dest", "/keys/100%")
    assert hop.known_hosts == (f"{HOME}/kh1", "/kh2")
    assert (hop.known_hosts_name, hop.connect_timeout_s) == ("the-dest", 3)
    assert (hop.identities_only, hop.agent) == (True, f"{HOME}/agent.sock")


def test_target_comes_before_the_configuration() -> None:
    config = "Match user root\n IdentityFile /for-root\nHost *\n User admin\n Port 2200\n UserKnownHostsFile /kh\n"
    (hop,) = hops(Target("dest", "root", 22, ("/mine",), known_hosts="/known"), config)
    assert (hop.user, hop.port, hop.known_hosts) == ("root", 22, ("/known",))
    assert hop.identity_files == ("/mine", "/for-root")
    assert hop.required_files == ("/mine",)


def test_identity_files_replace_the_default_keys() -> None:
    (hop,) = hops(Target("dest", identity_files=("/mine",)), "")
    assert hop.identity_files == ("/mine",)


def test_names_in_known_hosts() -> None:
    assert hops(Target("Dest"), "")[0].known_hosts_name == "dest"
    assert hops(Target("fd00::1", port=2200), "")[0].known_hosts_name == "[fd00::1]:2200"


def test_jumps_each_with_its_own_configuration() -> None:
    config = """
    Host dest
        ProxyJump two@mid:2022
    Host mid
        ProxyJump outer
        IdentityFile /mid-key
    Host outer
        User one
        HostName 192.0.2.1
    """
    outer, mid, dest = hops(Target("dest", "three"), config)
    assert (outer.user, outer.host, outer.port) == ("one", "192.0.2.1", 22)
    assert (mid.user, mid.host, mid.port, mid.identity_files) == ("two", "mid", 2022, ("/mid-key",))
    assert (dest.user, dest.host) == ("three", "dest")


def test_a_list_of_jumps_is_the_whole_way() -> None:
    config = "Host dest\n ProxyJump a,ssh://u@b:23,[fd00::1]:24\nHost b\n ProxyJump elsewhere\nHost a\n ProxyJump z\n"
    assert [(hop.host, hop.port) for hop in hops(Target("dest"), config)] == [
        ("z", 22), ("a", 22), ("b", 23), ("fd00::1", 24), ("dest", 22)
    ]  # fmt: skip


@pytest.mark.parametrize("config", ["ProxyJump none", "ProxyCommand none", "ProxyCommand none\nProxyJump a"])
def test_no_proxy(config: str) -> None:
    (hop,) = hops(Target("dest"), config)
    assert hop.proxy_command is None


def test_the_first_of_the_two_ways_counts() -> None:
    (hop,) = hops(Target("dest", "me", 2200), "Host dest\n ProxyCommand nc -x %n %h %p %r %%\nHost *\n ProxyJump a\n")
    assert hop.proxy_command == "nc -x dest dest 2200 me %"
    assert len(hops(Target("dest"), "Host dest\n ProxyJump a\nHost *\n ProxyCommand nc %h\n")) == 3 - 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("Host a\n ProxyJump b\nHost b\n ProxyJump a\n", "circle"),
        ("ProxyJump -oBad\n", "is not"),
        ("Port many\n", "many"),
        ("nonsense\n", "nonsense"),
    ],
)
def test_configuration_that_makes_no_sense(config: str, words: str) -> None:
    with pytest.raises(LinkError, match=words):
        hops(Target("a"), config)


def test_include(tmp_path: Path) -> None:
    ssh = tmp_path / ".ssh"
    (ssh / "conf.d").mkdir(parents=True)
    (ssh / "config").write_text("Include conf.d/* absent\nHost dest\n Include extra\n Port 2200\n")
    (ssh / "conf.d" / "one").write_text("Host other\n User wrong\n")
    (ssh / "extra").write_text("User admin\nHost nobody\n Port 1\n")
    (hop,) = resolve(Target("dest"), HOME, read_config(Target("dest"), str(tmp_path)))
    assert (hop.user, hop.port) == ("admin", 2200)


def test_include_of_itself(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(f"Include {tmp_path}/config\n")
    with pytest.raises(LinkError, match="nested"):
        read_config(Target("dest", ssh_config=str(tmp_path / "config")), HOME)


def test_configuration_file_that_is_missing(tmp_path: Path) -> None:
    assert read_config(Target("dest"), str(tmp_path)) is not None
    with pytest.raises(LinkError, match="absent: No such file"):
        read_config(Target("dest", ssh_config=str(tmp_path / "absent")), HOME)


def _hashed(name: str) -> str:
    salt = bytes(range(20))
    digest = hmac.digest(salt, name.encode(), "sha1")
    return "|1|" + "|".join(base64.b64encode(part).decode() for part in (salt, digest))


@pytest.mark.parametrize(
    ("names", "name", "found"),
    [
        ("dest", "dest", True),
        ("DEST,192.0.2.1", "dest", True),
        ("dest", "dest2", False),
        ("*.example.org", "a.example.org", True),
        ("*.example.org,!a.example.org", "a.example.org", False),
        ("[dest]:22?0", "[dest]:2200", True),
        ("[dest]:2200", "dest", False),
        ("dest", "[dest]:2200", False),
        (_hashed("[dest]:2200"), "[dest]:2200", True),
        (_hashed("dest"), "dest2", False),
        ("|1|broken", "dest", False),
    ],
)
def test_names_of_a_known_hosts_line(names: str, name: str, found: bool) -> None:
    text = f"# a comment\n\n{names} ssh-ed25519 {KEY} comment\nshort line\n"
    assert bool(known_keys([("file", text)], name)) == found


HOP = Hop("dest", "dest", 2200, "root", (), known_hosts=("/kh",))
NAME = "[dest]:2200"


def test_known_key() -> None:
    text = f"{NAME} ssh-ed25519 {OTHER}\n{NAME} ssh-ed25519 {KEY}\n"
    judge(HOP, known_keys([("/kh", text)], NAME), "ssh-ed25519", KEY)


def test_unknown_key_is_told_as_the_line_that_makes_it_known() -> None:
    for text in ("", f"{NAME} ssh-rsa {OTHER}\n", f"@cert-authority {NAME} ssh-ed25519 {KEY}\n"):
        with pytest.raises(LinkError, match="unknown host key SHA256:") as caught:
            judge(HOP, known_keys([("/kh", text)], NAME), "ssh-ed25519", KEY)
        assert "to /kh: " in str(caught.value)
        line = str(caught.value).rpartition(": ")[2]
        judge(HOP, known_keys([("/kh", text + line)], NAME), "ssh-ed25519", KEY)


def test_changed_key() -> None:
    known = known_keys([("/kh", f"\n{NAME} ssh-ed25519 {OTHER}\n")], NAME)
    with pytest.raises(LinkError, match=r"HAS CHANGED.*/kh:2"):
        judge(HOP, known, "ssh-ed25519", KEY)


def test_revoked_key() -> None:
    known = known_keys([("/kh", f"{NAME} ssh-ed25519 {KEY}\n@revoked * ssh-ed25519 {KEY}\n")], NAME)
    with pytest.raises(LinkError, match=r"revoked \(/kh:2\)"):
        judge(HOP, known, "ssh-ed25519", KEY)
