"""A container engine's checkpoint as one file: a tar archive, plain or compressed, with CRIU's images in one of its
directories (podman, CRI-O and containerd: `checkpoint/`; whoever packs a directory of `runc checkpoint`: any).

Only the files that tell of connections are kept; memory pages, by far the most of it, are read past. The archive is
input: no member is written anywhere, links are not followed, what a header claims is bounded before anything is read,
and what one file of it expands to is bounded as the images of a directory are.

The compression is told by the first bytes, not by the name: podman writes zstd into `checkpoint.tar.gz`.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..core import imageset
from ..core.errors import Refused
from ..core.state import MAX_CARRIED

_SIZE_LIMIT = 2 * MAX_CARRIED  # bytes of all files that are kept
_MEMBERS_LIMIT = 1_000_000
_UNPACKED_LIMIT = 1 << 40  # bytes, most of them memory pages
_READ_LIMIT = 1 << 20  # bytes that a header of tar may take
_SKIP = 1 << 18
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # RFC 1952 2.3.1; RFC 8878 3.1.1


class _Forward(io.RawIOBase):
    """A stream that can be sought forwards, as tarfile wants it, and that gives no more at once than a header may
    take."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._position = stream, 0
        self.limit = _READ_LIMIT

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.limit:
            raise tarfile.ReadError(f"a header of {size} bytes")
        data = b""
        while len(data) < size and (more := self._stream.read(size - len(data))):
            data += more
        self._position += len(data)
        if self._position > _UNPACKED_LIMIT:
            raise tarfile.ReadError(f"it has more than {_UNPACKED_LIMIT >> 30} GiB")
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self._position:
            raise tarfile.ReadError("a member before the last one")
        while self._position < offset:
            if not self.read(min(_SKIP, offset - self._position)):
                break
        return self._position


def read(archive: str | Path) -> dict[str, bytes]:
    """The files of an archive that tell of connections: name -> contents, of the one directory in it that holds CRIU's
    images. Refused where it cannot be read, or has no such directory, or several."""
    found: dict[str, dict[str, bytes]] = {}
    left = _SIZE_LIMIT
    with _explained(archive), ExitStack() as stack:
        forward = _Forward(stack.enter_context(_unpacked(archive)))
        tar = stack.enter_context(tarfile.open(fileobj=forward, mode="r:"))
        for member in _members(tar):
            path = PurePosixPath(member.name)
            if not member.isreg() or member.sparse is not None or not imageset.WANTED.fullmatch(path.name):
                continue
            if member.size > left:
                raise Refused(f"the images in {archive} are over {_SIZE_LIMIT >> 20} MiB")
            left -= member.size
            found.setdefault(str(path.parent), {})[path.name] = _contents(forward, member)
    places = [place for place, files in found.items() if "files.img" in files or "inetsk.img" in files]
    if len(places) != 1:
        raise Refused(f"{archive} has {len(places)} directories of CRIU images", hint="unpack it, and name one with -D")
    return found[places[0]]


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for _ in range(_MEMBERS_LIMIT):
        member = tar.next()
        if member is None:
            return
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep every one
        yield member
    raise tarfile.ReadError(f"it has more than {_MEMBERS_LIMIT} members")


def _contents(forward: _Forward, member: tarfile.TarInfo) -> bytes:
    forward.seek(member.offset_data)
    parts, left = [], member.size
    while left:
        part = forward.read(min(left, _SKIP))
        if not part:
            raise tarfile.ReadError(f"{member.name} is cut short")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


@contextmanager
def _unpacked(archive: str | Path) -> Iterator[IO[bytes]]:
    # Not a pipe or a device, which could be waited for.
    with open(os.open(archive, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Refused(f"{archive} is not a file", hint="a directory of images is named with -D")
        head = file.peek(4)
        if head.startswith(_GZIP):
            with gzip.GzipFile(fileobj=file) as stream:
                yield stream  # type: ignore[misc]
        elif head.startswith(_ZSTD):
            with _zstandard(archive).ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream:
                yield stream
        else:
            yield file


def _zstandard(archive: str | Path) -> Any:
    try:
        import zstandard
    except ImportError:
        raise Refused(f"{archive} is compressed with zstd, which this Python cannot read",
                      hint="pip install 'criu-tcpcp[archives]', or unpack it with `zstd -d` first") from None
    return zstandard


@contextmanager
def _explained(archive: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise Refused(f"{archive} cannot be unpacked: {error}") from error
        raise Refused(f"cannot read {archive}: {error.strerror or error}") from error
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError) as error:
        raise Refused(f"{archive} is no archive of a checkpoint: {error}",
                      hint="an archive is one of podman, of another engine, or a tar of CRIU's images") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # its module may not be there
            raise
        raise Refused(f"{archive} cannot be unpacked: {error}") from error
