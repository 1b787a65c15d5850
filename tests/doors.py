"""A guarded door at the destination of a world: a key that may start `serve` there and nothing else, and its policy."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from criu_tcpcp.core import messages
from criu_tcpcp.lab.host import search_path
from criu_tcpcp.lab.sshd import DOOR_GID, DOOR_PORT, DOOR_USER
from criu_tcpcp.transport.wire import Wire
from world import COMMAND, PORT, World

SHIPPED = Path(__file__).parents[1] / "docs" / "door"

#: What a rule says where a test does not say otherwise: the pass that a world makes.
ALLOWED: dict[str, Any] = {"keys": ["web1"], "local": ["10.77.2.0/24"], "local-ports": [PORT],
                           "peers": ["10.77.1.0/24"], "peer-ports": ["1024-65535"], "users": "any",
                           "executables": "any", "ports": [PORT], "limit": 10}


def place(here: World) -> Path:
    """A directory that goes with the lab, and in which other users may look, as in /etc."""
    directory = here.lab.directory / "door"
    directory.mkdir(mode=0o755, exist_ok=True)
    return directory


class Door:
    """`user` logs in with a key that is called `key`, and `command` is forced upon it."""

    def __init__(self, here: World, rules: Mapping[str, Mapping[str, Any]], *, key: str = "web1", user: str = "root",
                 command: str | None = None) -> None:
        self.here = here
        self.policy, self.log = place(here) / "policy.toml", place(here) / "log"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.log))
        self.log.chmod(0o666)  # as /dev/log
        self.allow(rules)
        host = here.lab.destination
        host.start_sshd()
        forced = command or f"{COMMAND} serve --policy {self.policy} --key {key}"
        self.key = here.lab.ssh.force(host, user, f'restrict,command="{forced}"')
        self.options = ["-i", str(self.key), "--known-hosts", str(here.lab.ssh.known_hosts), "--host",
                        f"{user}@{host.ipv4}:{DOOR_PORT}"]
        here.ssh_options = self.options

    def allow(self, rules: Mapping[str, Mapping[str, Any]]) -> None:
        """The policy from the next login on."""
        lines = [f'audit = "{self.log}"']
        for name, rule in rules.items():
            lines += [f"[allow.{name}]", *(f"{field} = {json.dumps(value)}" for field, value in rule.items())]
        self.policy.write_text("\n".join(lines))
        self.policy.chmod(0o644)

    def audited(self) -> dict[str, str]:
        """The next line of the audit."""
        self._socket.settimeout(10)
        line = self._socket.recv(1 << 16).decode()
        match = re.fullmatch(r"<85>criu-tcpcp\[\d+\]: (.*)", line)
        assert match is not None, line
        fields = dict(re.findall(r'(\w+)=("(?:[^"\\]|\\.)*")', match[1]))
        assert " ".join(f"{name}={value}" for name, value in fields.items()) == match[1]
        return {name: json.loads(value) for name, value in fields.items()}

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class UsersDoor(Door):
    """As docs/door has it: an account that may do nothing logs in, and serve runs as `program_user`, with two
    capabilities."""

    def __init__(self, here: World, rules: Mapping[str, Mapping[str, Any]], program_user: str, *,
                 capabilities: str = "-all,+net_admin,+net_raw") -> None:
        run_dir = here.lab.destination.run_dir
        os.chown(run_dir / "passes", 0, DOOR_GID)
        (run_dir / "passes").chmod(0o3770)
        script = place(here) / "criu-tcpcp-door"
        script.write_text(replaced((SHIPPED / "criu-tcpcp-door").read_text(), {
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin":
                f"PATH='{search_path()}' CRIU_TCPCP_RUN_DIR='{run_dir}'",
            "/etc/criu-tcpcp/policy.toml": str(place(here) / "policy.toml"),
            "-all,+net_admin,+net_raw": capabilities}))
        script.chmod(0o755)
        names = {"/usr/local/sbin/criu-tcpcp-door redis": f"{script} {program_user}"}
        line = next(one for one in (SHIPPED / "authorized_keys").read_text().splitlines() if one.startswith("restrict"))
        forced = replaced(line, names).split('"')[1]
        super().__init__(here, rules, user=DOOR_USER, command=forced)
        here.lab.ssh.allow_sudo(replaced((SHIPPED / "sudoers").read_text(), names))


def replaced(text: str, by: Mapping[str, str]) -> str:
    """What is shipped, for a lab."""
    for old, new in by.items():
        assert old in text
        text = text.replace(old, new)
    return text


def changed(**fields: Any) -> dict[str, dict[str, Any]]:
    """The one rule, with other values."""
    return {"sessions": {**ALLOWED, **{name.replace("_", "-"): value for name, value in fields.items()}}}


class Voice:
    """Speaks to a serve behind the door, without SSH and without an origin's manners."""

    def __init__(self, door: Door, key: str) -> None:
        ours, its = socket.socketpair()
        with its:
            self.process = door.here.lab.destination.spawn(
                [COMMAND, "serve", "--policy", str(door.policy), "--key", key], stdin=its.fileno(), stdout=its.fileno(),
                env={"SSH_ORIGINAL_COMMAND": "id"})
        self._socket = ours
        self.wire = Wire(ours.fileno(), ours.fileno())
        self.hello = self.ask(messages.Hello(messages.PROTOCOL, "", "", "", []))

    def ask(self, message: messages.Message) -> messages.Message:
        self.wire.send(message)
        return self.wire.receive(20)

    def __enter__(self) -> Voice:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self.process.wait(20)
