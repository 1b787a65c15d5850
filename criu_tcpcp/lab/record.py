"""Which labs there are on this machine: one small file a lab, so that a lab whose creator was killed can be swept.

The record is written before the first thing it tells of exists, and removed after the last one is gone. It says which
process made the lab, by pid and start time (a pid alone may be somebody else's by now), and lists the hosts; all names
follow from the lab's id, by the functions here.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

_RECORDS = Path("/run/criu-tcpcp-lab")


@dataclass(frozen=True)
class Record:
    """One lab. `joinable`: it stands there for others to look inside (`python -m criu_tcpcp.lab up`)."""

    id: str
    creator_pid: int
    creator_start: int
    servers: list[str]
    joinable: bool = False

    @property
    def directory(self) -> Path:
        # In memory, as /run is on a host, and not under TMPDIR: the path of a unix socket has room for 107 bytes, and
        # sshd must find it beside its own /run.
        return Path("/dev/shm" if os.path.ismount("/dev/shm") else "/tmp", f"tcpcp-{self.id}")

    def namespace(self, host: str) -> str:
        return f"tcpcp-{self.id}-{host}"

    def creator_lives(self) -> bool:
        return start_time(self.creator_pid) == self.creator_start

    def write(self) -> None:
        """Raises FileExistsError for an id that is taken. The file is complete from the moment it has its name."""
        temporary = _RECORDS / f".{self.id}.{os.getpid()}"
        while True:
            _RECORDS.mkdir(mode=0o700, exist_ok=True)
            # The last lab to go removes the directory, perhaps just now.
            with contextlib.suppress(FileNotFoundError):
                temporary.write_text(json.dumps(asdict(self)))
                break
        try:
            os.link(temporary, self._path)
        finally:
            temporary.unlink()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):      # other labs are there, or it is gone already
            _RECORDS.rmdir()

    @property
    def _path(self) -> Path:
        return _RECORDS / f"{self.id}.json"


def records() -> Iterator[Record]:
    """Every lab on this machine."""
    for path in sorted(_RECORDS.glob("[!.]*.json")):
        try:
            yield Record(**json.loads(path.read_text()))
        except FileNotFoundError:
            continue
        except (ValueError, TypeError) as error:
            raise RuntimeError(f"{path} is not a lab's record; remove it ({error})") from None


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks after boot, or None if it is dead, a zombie included."""
    status = stat_fields(pid)
    return None if status is None or status[0] in "ZXx" else int(status[19])


def stat_fields(pid: int) -> list[str] | None:
    """/proc/PID/stat from the state on (proc(5), field 3). The name before it may contain anything, even brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
