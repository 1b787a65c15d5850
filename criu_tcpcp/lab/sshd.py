"""SSH between the hosts of a lab: real OpenSSH servers, with nothing of the machine's own SSH set-up in them.

sshd wants things from the machine that a lab must not make there: the directory /run/sshd, which exists only while
Debian's service runs; without PAM, a root account that is not locked; and root's shell, which as bash would read
somebody's ~/.bashrc before every command. So it gets a private mount namespace, with an empty /run that holds just
that directory, and a passwd and a shadow file of its own. A remote command is to see what every other process of the
lab sees: ForceCommand takes it back to the file system of the process that made the lab. Keys are the lab's own, made
when the first server starts; ~/.ssh is neither read nor written.

Each server has a second port, DOOR_PORT, which is as an administrator would have set it up: a key may do what its line
says (`Ssh.force`). A command there stays in sshd's own file system, with the lab's accounts: those of the machine, and
DOOR_USER, who is nobody else's.
"""

from __future__ import annotations

import shlex
import stat
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .record import start_time

if TYPE_CHECKING:
    from .host import Host

_SSHD = "/usr/sbin/sshd"
DOOR_PORT = 2222
DOOR_USER, DOOR_GROUP = "criu-tcpcp-door", "criu-tcpcp"  # as in docs/door.md
_DOOR_UID, DOOR_GID = 63999, 63998
_CHECKOUT = Path(__file__).parents[2]

# $1 the directory with the files for /etc, $2 the configuration. $3 the checkout, $4 the directory on the way there
# that is closed to others, as /root is, or '': then others can reach the programs of the checkout all the same. Not
# every machine has sudo. OpenSSH 9.8 began to shut out addresses after failed logins (PerSourcePenalties), which are
# what some tests are about; an older one does not know the word, and would not start.
_START = f"""
for file in passwd shadow group sudoers; do
    [ ! -e "/etc/$file" ] || mount --bind "$1/$file" "/etc/$file" || exit
done
mount -t tmpfs -o mode=755 tmpfs /run && mkdir -m 755 /run/sshd || exit
if [ -n "$4" ]; then
    mkdir /run/checkout && mount --bind "$3" /run/checkout && mount -t tmpfs -o mode=755 tmpfs "$4" || exit
    for part in criu_tcpcp .venv; do
        mkdir -p "$3/$part" && mount --bind "/run/checkout/$part" "$3/$part" || exit
    done
fi
if {_SSHD} -t -f "$2" -o PerSourcePenalties=no 2>/dev/null; then
    exec {_SSHD} -D -e -f "$2" -o PerSourcePenalties=no
fi
exec {_SSHD} -D -e -f "$2"
"""


class Ssh:
    """The keys and files of one lab, and its servers."""

    def __init__(self, directory: Path, creator_pid: int) -> None:
        self._directory = directory / "ssh"
        self._forced = directory / "forced"               # sshd reads them as the user who logs in
        self._creator_pid = creator_pid
        self.key = self._directory / "id_ed25519"
        self.known_hosts = self._directory / "known_hosts"
        self.config = self._directory / "ssh_config"      # for `ssh -F`: the hosts by their names

    def start(self, host: Host, *, timeout_s: float = 10) -> None:
        """Start `host`'s server, and return when it listens. Does nothing if it runs, whoever started it."""
        if self._runs(host):
            return
        if not self.key.exists():
            self._prepare()
        if not (self._directory / f"{host.name}-host-key").exists():
            self._introduce(host)
        self._pid_file(host).unlink(missing_ok=True)
        log = self._directory / f"{host.name}.log"
        with log.open("wb") as output:
            server = host.spawn(["unshare", "--mount", "--propagation", "slave", "sh", "-c", _START, "sshd",
                                 self._directory, self._server_config(host), _CHECKOUT, _closed(_CHECKOUT)],
                                stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        deadline = time.monotonic() + timeout_s
        while not self._runs(host):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"sshd of {host.name} does not start: {log.read_text(errors='replace').strip()}")
            time.sleep(0.002)

    def force(self, host: Host, user: str, line: str) -> Path:
        """A new key with which `user` may log in at `host`'s DOOR_PORT and do what `line`, in front of the key in
        authorized_keys, says; the file of its private half."""
        number = len(list(self._directory.glob("forced-*.pub")))
        key = self._directory / f"forced-{number}"
        _generate_key(key)
        keys = self._forced / f"{host.name}-{user}"
        with keys.open("a") as authorized:
            authorized.write(f"{line} {key.with_suffix('.pub').read_text()}")
        return key

    def allow_sudo(self, lines: str) -> None:
        """What sudoers says from now on, at every host."""
        (self._directory / "sudoers").write_text(lines)

    def _runs(self, host: Host) -> bool:
        """sshd writes its pid when it listens."""
        try:
            text = self._pid_file(host).read_text()
        except FileNotFoundError:
            return False
        return text.endswith("\n") and start_time(int(text)) is not None

    def _pid_file(self, host: Host) -> Path:
        return self._directory / f"{host.name}.pid"

    def _prepare(self) -> None:
        """What all hosts share."""
        self._directory.mkdir(mode=0o700)
        self._forced.mkdir(mode=0o755)
        self._write_accounts()
        # ssh takes the first value it finds, so the hosts' names can follow what holds for all.
        self.config.write_text(f"Host *\n    User root\n    IdentityFile {self.key}\n    IdentitiesOnly yes\n"
                               f"    UserKnownHostsFile {self.known_hosts}\n    GlobalKnownHostsFile none\n"
                               "    StrictHostKeyChecking yes\n    BatchMode yes\n")
        _generate_key(self.key)

    def _introduce(self, host: Host) -> None:
        """Make `host`'s key, and the clients know it."""
        key = self._directory / f"{host.name}-host-key"
        _generate_key(key)
        kind, public = key.with_suffix(".pub").read_text().split()[:2]
        with self.known_hosts.open("a") as known:
            known.write(f"{host.name},{host.ipv4},{host.ipv6},[{host.ipv4}]:{DOOR_PORT} {kind} {public}\n")
        with self.config.open("a") as config:
            config.write(f"Host {host.name}\n    HostName {host.ipv4}\n")

    def _write_accounts(self) -> None:
        """The machine's accounts, but root with the plain shell; and root with no password, which is not locked."""
        accounts, groups = ([line.split(":") for line in Path(file).read_text().splitlines()
                             if line.split(":")[0] not in (DOOR_USER, DOOR_GROUP)]
                            for file in ("/etc/passwd", "/etc/group"))
        accounts.append([DOOR_USER, "x", str(_DOOR_UID), str(_DOOR_UID), "", "/", "/bin/sh"])
        groups += [[DOOR_USER, "x", str(_DOOR_UID), ""], [DOOR_GROUP, "x", str(DOOR_GID), ""]]
        files = {"passwd": "".join(":".join([*fields[:-1], "/bin/sh"] if fields[0] == "root" else fields) + "\n"
                                   for fields in accounts),
                 "shadow": "".join(f"{name}:*:19000:0:99999:7:::\n" for name in ("root", DOOR_USER)),
                 "group": "".join(":".join(fields) + "\n" for fields in groups), "sudoers": ""}
        for name, text in files.items():
            (self._directory / name).write_text(text)
        (self._directory / "sudoers").chmod(0o440)

    def _server_config(self, host: Host) -> Path:
        # sshd sets PATH first and SetEnv's variables later, so ours wins.
        variables = " ".join(f'"{name}={value}"' for name, value in host.environment().items())
        command = shlex.quote('cd; if [ -n "$SSH_ORIGINAL_COMMAND" ]; then exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"; '
                              'else exec /bin/bash --norc; fi')
        maker = self._creator_pid
        path = self._directory / f"{host.name}-sshd_config"
        path.write_text("\n".join([
            "Port 22",
            f"Port {DOOR_PORT}",
            "ListenAddress 0.0.0.0",
            "ListenAddress ::",
            f"HostKey {self._directory}/{host.name}-host-key",
            f"PidFile {self._pid_file(host)}",
            f"AuthorizedKeysFile {self.key}.pub",
            "StrictModes no",                       # it would judge the machine's /tmp
            "PermitRootLogin prohibit-password",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "UsePAM no",
            "UseDNS no",
            "PermitUserRC no",
            "PrintMotd no",
            "PrintLastLog no",
            "MaxStartups 1000:30:2000",
            "MaxSessions 1000",
            "MaxAuthTries 100",
            "Subsystem sftp /usr/lib/openssh/sftp-server",
            f"SetEnv {variables}",
            # --root too: the lab's maker may be in a chroot. Its root is the directory to start in, until the `cd`.
            f"ForceCommand exec nsenter -t {maker} --mount --root --wd=/proc/{maker}/root -- /bin/sh -c {command}",
            f"Match LocalPort {DOOR_PORT}",
            "ForceCommand none",
            "PermitRootLogin forced-commands-only",
            f"AuthorizedKeysFile {self._forced}/{host.name}-%u",
            ""]))
        return path


def _closed(path: Path) -> str:
    """The first directory on the way to what is in `path` that others may not enter, or ''."""
    return next((str(one) for one in (*reversed(path.parents), path) if not one.stat().st_mode & stat.S_IXOTH), "")


def _generate_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", path], check=True,
                   stdin=subprocess.DEVNULL)
