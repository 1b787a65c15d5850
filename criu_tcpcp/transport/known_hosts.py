"""Who is there: `judge` looks a host key up in the text of known_hosts files (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT).

Patterns, hashed names, revoked keys. An unknown key is always refused, whatever StrictHostKeyChecking says; the error
is the line to add. Pure: what the files hold is given to it.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from ..core.errors import LinkError
from .ssh_config import Hop


@dataclass(frozen=True)
class KnownKey:
    """A host key that a known_hosts file has for a name. `where` is file:line."""

    key_type: str
    base64: str
    where: str
    revoked: bool = False


def known_keys(texts: Iterable[tuple[str, str]], name: str) -> list[KnownKey]:
    """The keys of the host in these (file name, text) pairs. Lines of certificate authorities are not used."""
    found = []
    for file, text in texts:
        for number, line in enumerate(text.splitlines(), 1):
            fields = line.split()
            if not fields or fields[0].startswith("#"):
                continue
            marker = fields.pop(0) if fields[0].startswith("@") else ""
            if len(fields) < 3 or marker not in ("", "@revoked") or not _names(fields[0], name):
                continue
            found.append(KnownKey(fields[1], fields[2], f"{file}:{number}", revoked=bool(marker)))
    return found


def _names(patterns: str, name: str) -> bool:
    """Whether the first field of a known_hosts line names the host (sshd(8))."""
    if patterns.startswith("|1|"):
        try:
            salt, digest = (base64.b64decode(part, validate=True) for part in patterns[3:].split("|"))
        except ValueError:
            return False
        return hmac.compare_digest(hmac.digest(salt, name.encode(), "sha1"), digest)
    matched = False
    for pattern in patterns.lower().split(","):
        negated = pattern.startswith("!")
        # Only * and ? are special there: the brackets around a host with a port are not.
        if fnmatch.fnmatchcase(name.lower(), pattern.removeprefix("!").replace("[", "[[]")):
            if negated:
                return False
            matched = True
    return matched


def judge(hop: Hop, known: list[KnownKey], key_type: str, key_base64: str) -> None:
    """Return if the host's key is a known one; else raise the LinkError that says what to do."""
    same = [key for key in known if key.base64 == key_base64]
    digest = hashlib.sha256(base64.b64decode(key_base64)).digest()
    fingerprint = "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
    revoked = next((key for key in same if key.revoked), None)
    if revoked:
        raise LinkError(f"{hop}: the host key {fingerprint} is revoked ({revoked.where})")
    if same:
        return
    other = next((key for key in known if key.key_type == key_type and not key.revoked), None)
    if other:
        raise LinkError(
            f"{hop}: THE HOST KEY HAS CHANGED: it is {key_type} {fingerprint} now, and another at {other.where}",
            hint="either the host was installed anew, or another host answers in its place; ask its administrator",
        )
    file = hop.known_hosts[0] if hop.known_hosts else "known_hosts"
    raise LinkError(
        f"{hop}: unknown host key {fingerprint}; if that is right, add this line to {file}: "
        f"{hop.known_hosts_name} {key_type} {key_base64}"
    )
