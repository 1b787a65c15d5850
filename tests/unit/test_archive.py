"""A checkpoint archive: whatever it is compressed with, its images are found; what is none is refused, in bounds."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from criu_tcpcp.core import imageset
from criu_tcpcp.core.errors import Refused
from criu_tcpcp.core.image import encode
from criu_tcpcp.core.state import MAX_CARRIED
from criu_tcpcp.pipeline import archive
from states import plain

IMAGES = {"files.img": b"files", "inventory.img": b"inventory", "tcp-stream-1f.img": b"stream" * 100_000}
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes, "gzip": gzip.compress, "zstd": zstandard.compress,
    "two frames": lambda data: zstandard.compress(data[:1000]) + zstandard.compress(data[1000:])}


def packed(files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=kind) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return made.getvalue()


def of_an_engine(place: str = "checkpoint/") -> dict[str, bytes]:
    return {"config.dump": b"{}", f"{place}pages-1.img": bytes(3 << 20), f"{place}{'long-name' * 30}": b"",
            **{place + name: data for name, data in IMAGES.items()}, "rootfs-diff.tar": bytes(100)}


@pytest.mark.parametrize("place", ["checkpoint/", "", "./", "a/b/"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_images_are_found_whatever_it_is_compressed_with(tmp_path: Path, packing: str, place: str) -> None:
    (tmp_path / "checkpoint.tar.gz").write_bytes(PACKINGS[packing](packed(of_an_engine(place))))
    assert archive.read(tmp_path / "checkpoint.tar.gz") == IMAGES


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar(tmp_path: Path, kind: int) -> None:
    files = of_an_engine()
    if kind == tarfile.USTAR_FORMAT:
        del files[f"checkpoint/{'long-name' * 30}"]
    (tmp_path / "x.tar").write_bytes(packed(files, kind))
    assert archive.read(tmp_path / "x.tar") == IMAGES


BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no archive of a checkpoint"),
    "noise": (bytes(range(256)) * 10, "no archive of a checkpoint"),
    "no images": (packed({"checkpoint/pages-1.img": b"x"}), "has 0 directories of CRIU images"),
    "two places": (packed({"a/files.img": b"x", "b/files.img": b"x"}), "has 2 directories of CRIU images"),
    "cut short": (packed(of_an_engine())[:-100_000], "cut short|no archive"),
    "gzip cut short": (gzip.compress(packed(of_an_engine()))[:-20], "no archive of a checkpoint"),
    "gzip bent": (gzip.compress(packed(of_an_engine()))[:100] + b"\0" * 400, "cannot be unpacked|no archive"),
    "zstd bent": (zstandard.compress(packed(of_an_engine()))[:60] + b"\0" * 400, "cannot be unpacked|no archive")}


@pytest.mark.parametrize("case", BAD)
def test_what_is_none_is_refused(tmp_path: Path, case: str) -> None:
    data, words = BAD[case]
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(Refused, match=words):
        archive.read(tmp_path / "x.tar")


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME], ids=repr)
def test_a_header_that_claims_gigabytes_is_refused_before_they_are_read(tmp_path: Path, kind: bytes) -> None:
    """The file has them: it is sparse."""
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(header("x", 8 << 30, kind))
        file.truncate(9 << 30)
    with pytest.raises(Refused, match=f"a header of {8 << 30} bytes"):
        archive.read(tmp_path / "x.tar")


def test_images_that_are_too_large_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(header("files.img", 3 * MAX_CARRIED))
        file.truncate(4 * MAX_CARRIED)
    with pytest.raises(Refused, match="are over 512 MiB"):
        archive.read(tmp_path / "x.tar")


def test_a_link_is_not_followed_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    link = tarfile.TarInfo("checkpoint/inventory.img")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        tar.addfile(link)
    (tmp_path / "x.tar").write_bytes(made.getvalue()[:512] + packed({"checkpoint/files.img": b"files"}))
    assert archive.read(tmp_path / "x.tar") == {"files.img": b"files"}
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(Refused, match=r"is not a file|Is a directory"):
            archive.read(path)


def test_without_the_library_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.tar.gz").write_bytes(zstandard.compress(b"x"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(Refused, match="zstd, which this Python cannot read"):
        archive.read(tmp_path / "x.tar.gz")


def test_the_command_shows_the_same_of_an_archive_and_of_its_directory(tmp_path: Path) -> None:
    files = imageset.write(encode(plain()), 1234, imageset.Owner(42, "server", (7,)), b"state", {"id": "x"})
    place = tmp_path / "images"
    place.mkdir()
    for name, data in files.items():
        (place / name).write_bytes(data)
    (tmp_path / "checkpoint.tar.gz").write_bytes(
        zstandard.compress(packed({f"checkpoint/{name}": data for name, data in files.items()})))
    command = [sys.executable, "-m", "criu_tcpcp", "show", "--json"]
    shown = [subprocess.run([*command, *where], capture_output=True, text=True, check=True).stdout
             for where in (["-D", str(place)], [str(tmp_path / "checkpoint.tar.gz")])]
    assert shown[0] == shown[1]
    assert json.loads(shown[1])["local"] == str(plain().flow.local)
    for where in ([], ["-D", str(place), "x"]):
        assert subprocess.run([*command, *where], capture_output=True, check=False).returncode == 2
