"""An image directory on disk: made whole or not at all, and read with care.

The files are written into a directory beside the wanted one, `.NAME.ID.incomplete`, and that is renamed into place: so
the wanted one appears with everything in it, or not at all, whatever dies and however full the disk is. rename(2) takes
the place of an empty directory, and of no other thing. What a killed process has left lies under a name that
`remnant_of` knows, for whoever cleans up after it.

The images hold payload: mode 0600 in 0700, new files only, no symbolic link is followed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from .core import imageset
from .core.errors import Refused
from .core.image import Image
from .core.state import MAX_CARRIED

_SIZE_LIMIT = 2 * MAX_CARRIED  # bytes of all files that are read
_FILES_LIMIT = 100_000


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(f"cannot {what}: {error.strerror or error}",
                      hint="another directory can be given with -D") from error


def absolute(directory: str | Path) -> Path:
    """The directory by a path that does not depend on where a process is. Its last part may be a link, which is then
    refused: the place is what was named."""
    path = Path(os.path.abspath(os.path.expanduser(directory)))
    if not path.name:
        raise Refused(f"{directory} cannot be the directory for the images", hint="name a new directory")
    return path


def remnant_of(directory: Path, dump_id: str) -> Path:
    """Where the files of this dump are until they are complete."""
    return directory.parent / f".{directory.name}.{dump_id}.incomplete"


def refuse_unfit(directory: Path) -> None:
    """Refused where images could not be put there. Nothing is changed."""
    with _explained(f"use {directory}"):
        try:
            found = os.lstat(directory)
        except FileNotFoundError:
            if not directory.parent.is_dir():
                raise Refused(f"there is no directory {directory.parent}") from None
            return
        if not stat.S_ISDIR(found.st_mode):
            raise Refused(f"{directory} is not a directory", hint="-D names a new or an empty one")
        if os.path.ismount(directory):
            raise Refused(f"{directory} is a mount point", hint="name a directory in it")
        if next(os.scandir(directory), None) is not None:
            raise Refused(f"{directory} is not empty", hint="-D names a new or an empty directory")


def files_of(image: Image, inode: int, owner: imageset.Owner, app_state: bytes, dump_id: str, *,
             left_running: bool) -> dict[str, bytes]:
    """The files of a dump that is made now, on this host."""
    return imageset.write(image, inode, owner, app_state, {
        "id": dump_id, "host": socket.gethostname(), "left_running": left_running,
        "taken": datetime.now(UTC).isoformat(timespec="seconds")})


def begin(directory: Path, dump_id: str) -> None:
    """Make the place for the files, before anything is stopped."""
    refuse_unfit(directory)
    with _explained(f"write beside {directory}"):
        os.mkdir(remnant_of(directory, dump_id), 0o700)


def write(directory: Path, dump_id: str, files: Mapping[str, bytes]) -> None:
    """Write the files, to where nobody looks for them yet; they are on the disk when this returns. Refused: some may
    have been written, `discard` takes them away."""
    with _explained(f"write the images for {directory}"):
        place = os.open(remnant_of(directory, dump_id), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for name, data in files.items():
                descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600,
                                     dir_fd=place)
                with open(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            os.fsync(place)
        finally:
            os.close(place)


def publish(directory: Path, dump_id: str) -> None:
    """Under their name from now on."""
    with _explained(f"make {directory}"):
        os.rename(remnant_of(directory, dump_id), directory)
        parent = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def discard(directory: Path, dump_id: str) -> None:
    """Take away what was not published; nothing there is as good."""
    shutil.rmtree(remnant_of(directory, dump_id), ignore_errors=True)


def read(directory: str | Path) -> dict[str, bytes]:
    """The files of a directory that tell of connections: name -> contents. Refused where it cannot be read. Pipes,
    devices and links are not opened, and nothing is read of what is too large."""
    found: dict[str, bytes] = {}
    left = _SIZE_LIMIT
    with _explained_reading(directory):
        place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            names = sorted(name for name in os.listdir(place) if imageset.WANTED.fullmatch(name))
            if len(names) > _FILES_LIMIT:
                raise Refused(f"there are too many images in {directory}: {len(names)}")
            for name in names:
                if stat.S_ISREG(os.lstat(name, dir_fd=place).st_mode):
                    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                                         dir_fd=place)
                    with open(descriptor, "rb") as file:
                        size = os.fstat(descriptor).st_size
                        if size > left:
                            raise Refused(f"the images in {directory} are over {_SIZE_LIMIT >> 20} MiB")
                        found[name] = file.read(size)
                        left -= size
        finally:
            os.close(place)
    return found


@contextlib.contextmanager
def _explained_reading(directory: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(f"cannot read {directory}: {error.strerror or error}",
                      hint="-D names a directory of CRIU images") from error
