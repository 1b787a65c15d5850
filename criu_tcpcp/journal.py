"""What survives the processes of a pass: one directory a pass and side, under the run directory.

    RUN_DIR/passes/ID.origin/       log (one JSON object a line)  state (the images, until Active)
    RUN_DIR/passes/ID.destination/  log                           verdict ("committed" or "aborted")

All is root's, and closed to others. Where root lets a group make journals in `passes` (docs/door.md), its members may
read those of others, so that a connection is not passed twice at once, but no payload.

The run directory lies on tmpfs and sockets do not outlive their host, so there is no fsync; each record carries the
boot id, and a record of another boot is history. A line that was cut short by a crash or a full disk is as good as not
written, and so is one in which a field is not what its name says (`_FORMS`). The *verdict* is the commit point: it is
renamed into place only where none is (RENAME_NOREPLACE), so of any number of processes that decide at once the first
wins, and all of them learn what was decided.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from .core.errors import JournalError, KernelError, Refused
from .core.state import MAX_CARRIED
from .kernel.syscalls import boot_id, rename_no_replace

Side = Literal["origin", "destination"]
Verdict = Literal["committed", "aborted"]
ORIGIN: Side = "origin"
DESTINATION: Side = "destination"

TOLD = "told"  # record of an origin, beside the stages: the destination knows that it will not be asked again
ANNOUNCED = "announced"  # record of an origin, beside the stages: the network was told that the pass begins
TUNNEL = "tunnel"  # record of either side, beside the stages: the pass's packets take this one
ADDRESS = "address"  # record of either side, beside the stages: how far the local address has moved
LAID = "laid"  # record of a destination, beside the stages: its packets travel over the link
LOST_MARK = "lost"  # of the destination: what lived there has ended there
#: The last record of an origin's journal while the pass's end is not known.
UNSETTLED = ("offered", "let go", "committed")

_ID = re.compile(r"[0-9a-f]{16}")
_LOG_LIMIT = 1 << 20
_STATE_LIMIT = MAX_CARRIED + (1 << 20)
_VERDICT_LIMIT = 16


def run_directory() -> Path:
    """CRIU_TCPCP_RUN_DIR, or /run/criu-tcpcp."""
    return Path(os.environ.get("CRIU_TCPCP_RUN_DIR") or "/run/criu-tcpcp")


def applications_directory() -> Path:
    """Where applications put their sockets (application.py). Any user may, none may touch another's: mode 1777, made by
    the first command that root runs."""
    return run_directory() / "apps"


@contextlib.contextmanager
def _explained(what: str, *but: type[OSError]) -> Iterator[None]:
    try:
        yield
    except but:
        raise
    except OSError as error:
        raise JournalError(f"cannot {what}: {error.strerror or error}",
                           hint=f"{error.filename or run_directory()} must be writable by root and have space"
                           ) from error


def prepare_run_directory() -> None:
    """Make the run directory and its parts; JournalError where that cannot be."""
    with _explained("make the run directory"):
        if not run_directory().exists():
            run_directory().mkdir(parents=True)
            run_directory().chmod(0o755)  # whatever the umask: applications must reach their part of it
        (run_directory() / "passes").mkdir(mode=0o700, exist_ok=True)
        if not applications_directory().exists():
            applications_directory().mkdir(mode=0o1777)
            applications_directory().chmod(0o1777)  # whatever the umask
    refuse_unsafe_run_directory()


def refuse_unsafe_run_directory() -> None:
    """JournalError where another user could have made what is in it, or can change it. Nothing there is as good.
    Journals may be a group's, where root gave it the directory so (mode 3770, docs/door.md)."""
    for path, forbidden in ((run_directory(), 0o022), (run_directory() / "passes", 0o077),
                            (applications_directory(), 0)):
        with contextlib.suppress(FileNotFoundError), _explained("look at the run directory", FileNotFoundError):
            found = os.lstat(path)
            if not stat.S_ISDIR(found.st_mode):
                raise JournalError(f"{path} is not a directory (a link is not followed)")
            if found.st_uid not in (0, os.geteuid()):
                raise JournalError(f"{path} belongs to another user (number {found.st_uid})",
                                   hint="it must be root's")
            if found.st_mode & stat.S_ISGID:
                forbidden &= ~0o070
            if found.st_mode & forbidden:
                raise JournalError(f"{path} is open to others (mode {stat.S_IMODE(found.st_mode):o})",
                                   hint=f"chmod {0o777 & ~forbidden:o} {path}, if nobody has been at it")
            if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
                raise JournalError(f"in {path} others may remove what is not theirs", hint=f"chmod +t {path}")


@contextlib.contextmanager
def structure_lock() -> Iterator[None]:
    """One process at a time adds or removes what several passes share (routing rules). Never taken within a freeze."""
    prepare_run_directory()
    with _explained("lock the run directory"):
        descriptor = os.open(run_directory() / "passes", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def _is_shared() -> bool:
    """A group may make journals."""
    return bool((run_directory() / "passes").stat().st_mode & stat.S_IWGRP)


def new_id() -> str:
    return secrets.token_hex(8)


class Record(dict[str, Any]):
    """A record: its fields, each of which is what its name says. JournalError for one that is not there."""

    def __missing__(self, name: str) -> Any:
        raise JournalError(f"a journal is damaged: its record {self.get('record')!r} has no {name!r}",
                           hint=f"the passes are in {run_directory() / 'passes'}")


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


def _are_numbers(value: Any) -> bool:
    return type(value) is list and bool(value) and all(type(one) is int for one in value)


def _is_identity(value: Any) -> bool:
    return _are_numbers(value) and len(value) == 2


#: What holds for the fields that others rely upon, whatever the record.
_FORMS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("record", "boot", "host", "destination_boot", "into", "way", "origin_sees", "key", "rule",
                     "tunnel", "phase", "origin_boot"),
                    _is(str)),
    **dict.fromkeys(("pid", "start_time", "cookie", "inode", "extracted_at_ms", "offered_at_ms", "sequence",
                     "descriptor", "mtu", "began_ms"), _is(int)),
    **dict.fromkeys(("divert", "keeps_fence", "tracked", "has_prologue", "fences", "injected"), _is(bool)),
    **dict.fromkeys(("flow", "flow_json", "thrown", "plan", "target", "held"), _is(dict)),
    "descriptors": _are_numbers, "taker": _is_identity, "network": _is_identity, "origin_network": _is_identity,
    "doubt_limit_s": _is(int, float),
    "place": _is(str, dict, type(None)), "outside": _is(dict, type(None)),
    "path": lambda value: type(value) is list and all(type(one) is str for one in value)}


def _records_of(log: bytes) -> list[Record]:
    """The whole records in a log, oldest first."""
    found = []
    for line in log.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and {"record", "boot"} <= record.keys() \
                    and all(_FORMS[name](value) for name, value in record.items() if name in _FORMS):
                found.append(Record(record))
    return found


class Journal:
    """The records of one side of one pass."""

    def __init__(self, pass_id: str, side: Side) -> None:
        if not _ID.fullmatch(pass_id):
            raise JournalError(f"{pass_id!r} is not the id of a pass",
                               hint="16 hexadecimal digits; see criu-tcpcp passes")
        self.pass_id = pass_id
        self.side = side
        self.directory = run_directory() / "passes" / f"{pass_id}.{side}"
        self._drafts: dict[Verdict, str] = {}

    def create(self) -> None:
        """Make the directory. JournalError where it is there already: an id is used once."""
        prepare_run_directory()
        with _explained("begin the journal of a pass"):
            self.directory.mkdir(mode=0o750 if _is_shared() else 0o700)

    def exists(self) -> bool:
        return self.directory.is_dir()

    def write(self, record: str, **fields: Any) -> None:
        """Append a record. JournalError where it could not be written whole: then it does not count. The line break in
        front of it ends a line that was cut short, which must not spoil this one."""
        text = json.dumps({"record": record, "boot": boot_id(), **fields}, separators=(",", ":"))
        line = f"\n{text}\n".encode()
        with _explained("write to the journal"):
            descriptor = os.open(self.directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                                 | os.O_NOFOLLOW, 0o640 if _is_shared() else 0o600)
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory))
            finally:
                os.close(descriptor)

    def records(self) -> list[Record]:
        """The whole records, oldest first."""
        return _records_of(self._read("log", _LOG_LIMIT) or b"")

    def _read(self, name: str, limit: int) -> bytes | None:
        """A file of the pass, no link; None where there is none. JournalError where it is over the limit."""
        with contextlib.suppress(FileNotFoundError), _explained(f"read the {name} of a pass", FileNotFoundError):
            descriptor = os.open(self.directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
                    raise JournalError(f"the {name} of pass {self.pass_id} is none of ours: {found.st_size} bytes, "
                                       f"mode {found.st_mode:o}")
                return file.read(found.st_size)
        return None

    def last(self) -> str:
        """The name of the last record that tells the pass's stage, or ''."""
        beside = ("note", TOLD, ANNOUNCED, TUNNEL, ADDRESS, LAID)
        return next((one["record"] for one in reversed(self.records()) if one["record"] not in beside), "")

    def field(self, record: str) -> Record | None:
        """The newest record of this name."""
        return next((one for one in reversed(self.records()) if one["record"] == record), None)

    # -- payload ------------------------------------------------------------------------------------------------------

    def save(self, name: str, data: bytes) -> None:
        """Keep payload until `forget`: a new file, readable by nobody else."""
        with _explained("keep the state of a pass"):
            descriptor = os.open(self.directory / name,
                                 os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
            except OSError:
                os.unlink(self.directory / name)
                raise

    def load(self, name: str) -> bytes:
        data = self._read(name, _STATE_LIMIT)
        if data is None:
            raise JournalError(f"the {name} of pass {self.pass_id} is gone")
        return data

    def forget(self, name: str) -> None:
        """Delete payload; none there is as good."""
        with contextlib.suppress(FileNotFoundError), _explained("delete the state of a pass"):
            try:
                os.unlink(self.directory / name)
            except FileNotFoundError:
                return

    # -- what must be writable on a full disk ------------------------------------------------------------------------

    def reserve(self, mark: str) -> None:
        """See that `set_mark` will need no space."""
        with _explained("write to the journal"):
            os.close(os.open(self.directory / f".{mark}", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC,
                             0o600))

    def set_mark(self, mark: str) -> None:
        """One rename. JournalError where it was not reserved; set already, it stays."""
        if not self.has_mark(mark):
            with _explained("write to the journal"):
                os.rename(self.directory / f".{mark}", self.directory / mark)

    def has_mark(self, mark: str) -> bool:
        return (self.directory / mark).exists()

    # -- the commit point ---------------------------------------------------------------------------------------------

    def draft(self, verdict: Verdict) -> None:
        """Write what `decide` then only has to rename: it takes time, and space that may be gone by then."""
        path = str(self.directory / f".{verdict}.{os.getpid()}")
        with _explained("write the verdict"):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC,
                                 0o640 if _is_shared() else 0o600)
            try:
                text = verdict.encode()
                if os.write(descriptor, text) != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            except OSError:
                os.unlink(path)
                raise
            finally:
                os.close(descriptor)
        self._drafts[verdict] = path

    def decide(self, wanted: Verdict) -> Verdict:
        """Write the verdict unless one is written; returns the one that stands. JournalError: none could be written."""
        if wanted not in self._drafts:
            self.draft(wanted)
        candidate = self._drafts.pop(wanted)
        with _explained("write the verdict"):
            try:
                rename_no_replace(candidate, str(self.directory / "verdict"))
            except KernelError as error:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(candidate)
                if error.errno != errno.EEXIST:
                    raise OSError(error.errno, os.strerror(error.errno), str(self.directory)) from error
            else:
                return wanted
        standing = self.verdict()
        if standing is None:
            raise JournalError("the verdict of a pass cannot be read back")
        return standing

    def verdict(self) -> Verdict | None:
        text = self._read("verdict", _VERDICT_LIMIT)
        if text is None:
            return None
        if text == b"committed":
            return "committed"
        if text == b"aborted":
            return "aborted"
        raise JournalError(f"the verdict of pass {self.pass_id} reads {text.decode(errors='replace')!r}")

    # -- one worker at a time -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claimed(self, flow: dict[str, Any]) -> Iterator[None]:
        """Begin the journal, and hold its lock for the block, as the only pass of this connection that is worked on at
        this host: each would take the other's rules away when it is undone. Refused where there is another."""
        with contextlib.ExitStack() as held:
            with structure_lock():
                other = working_on(flow)
                if other is not None:
                    raise Refused(f"pass {other.pass_id} of this connection is under way",
                                  hint="criu-tcpcp passes shows it")
                unsettled = _unsettled(flow)
                if unsettled is not None:
                    raise Refused(f"pass {unsettled.pass_id} of this connection is not settled",
                                  hint=f"criu-tcpcp resolve {unsettled.pass_id}")
                self.create()
                try:
                    held.enter_context(self.locked())
                    self.write("claimed", flow=flow, began_ms=int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000))
                except BaseException:
                    self.remove()
                    raise
            yield

    @contextlib.contextmanager
    def locked(self, *, wait: bool = True) -> Iterator[bool]:
        """Only one process works on this side of the pass. Without `wait`, yields False where another does."""
        with _explained("lock the journal"):
            descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(descriptor)

    def remove(self) -> None:
        """The pass is history and nothing of it is left: delete all of it."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _unsettled(flow: dict[str, Any]) -> Journal | None:
    """A pass of this connection from this host, offered and not known to be over: its fence must stand, and what it
    still has to do here would hit the connection's next life."""
    for journal in all_journals():
        last = journal.records()[-1:]
        if journal.side == ORIGIN and last and last[0]["record"] in UNSETTLED \
                and last[0]["boot"] == boot_id() and any(one.get("flow") == flow for one in journal.records()):
            return journal
    return None


def working_on(flow: dict[str, Any], but: Journal | None = None) -> Journal | None:
    """The journal of a pass of this connection that a process works on."""
    for journal in all_journals():
        if but is not None and journal.directory == but.directory:
            continue
        if any(record.get("flow") == flow for record in journal.records()):
            with contextlib.suppress(JournalError), journal.locked(wait=False) as idle:
                if not idle:
                    return journal
    return None


def newest_first() -> list[Journal]:
    """`all_journals` of this boot, by when their passes began."""
    began = {journal: claimed["began_ms"] for journal in all_journals()
             if (claimed := journal.field("claimed")) is not None and claimed["boot"] == boot_id()}
    return sorted(began, key=lambda journal: -began[journal])


def all_journals() -> list[Journal]:
    """Every side of every pass that this host knows, by id. JournalError where that cannot be told."""
    refuse_unsafe_run_directory()
    try:
        with _explained("read the run directory"):
            names = sorted(os.listdir(run_directory() / "passes"))
    except JournalError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    found = []
    for name in names:
        pass_id, _, side = name.partition(".")
        if _ID.fullmatch(pass_id) and side in (ORIGIN, DESTINATION):
            found.append(Journal(pass_id, ORIGIN if side == ORIGIN else DESTINATION))
    return found
