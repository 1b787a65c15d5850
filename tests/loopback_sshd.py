"""An sshd on a free port of 127.0.0.1, with keys and files of its own: what the tests of SSH connect to."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from criu_tcpcp.transport.target import Target

# A process namespace of its own: whatever a test's far command leaves running dies with the server. /run is empty but
# for what sshd asks for; the passwords file is one in which root is not locked, as sshd without PAM wants it.
_START = """
mount --bind "$1/shadow" /etc/shadow && mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd || exit
exec /usr/sbin/sshd -D -e -f "$1/sshd_config"
"""
_PATIENCE_S = 20.0


@contextlib.contextmanager
def loopback_sshd(place: Path) -> Iterator[Target]:
    """A target whose sshd runs for as long as the block; `place` is an empty directory for its files."""
    for name in ("host_key", "client_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / name], check=True)
    (place / "authorized_keys").write_bytes((place / "client_key.pub").read_bytes())
    (place / "ssh_config").touch()
    shadow = [line.split(":") for line in Path("/etc/shadow").read_text().splitlines()]
    (place / "shadow").touch(0o600)
    (place / "shadow").write_text("".join(":".join([f[0], "*", *f[2:]]) + "\n" for f in shadow))
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        (place / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1:{port}\nHostKey {place}/host_key\nAuthorizedKeysFile {place}/authorized_keys\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\nLogLevel QUIET\n"
        )
        unshare = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", _START, "sshd"]
        server = subprocess.Popen([*unshare, str(place)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if _listens(server, port):
            break
    key = (place / "host_key.pub").read_text()
    (place / "known_hosts").write_text(f"[127.0.0.1]:{port} {key}")
    try:
        yield Target("127.0.0.1", "root", port, (str(place / "client_key"),), str(place / "ssh_config"),
                     str(place / "known_hosts"))
    finally:
        server.kill()
        server.wait()


def _listens(server: subprocess.Popen[bytes], port: int) -> bool:
    """Whether the server came up; another process may have taken the port meanwhile."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as end:
            return end.recv(4) == b"SSH-" and server.poll() is None
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0.005)
            return False
    raise AssertionError("sshd does not start")
