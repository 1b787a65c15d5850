"""An image directory on disk is read with care: what is too large, a link, a pipe or a device is not read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from criu_tcpcp import imagedir
from criu_tcpcp.core.errors import Refused
from criu_tcpcp.core.state import MAX_CARRIED


def test_what_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """They are sparse: that they are refused takes no time and no memory."""
    for name, size in (("files.img", 10), ("tcp-stream-1.img", MAX_CARRIED), ("tcp-stream-2.img", MAX_CARRIED)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    os.truncate(tmp_path / "tcp-stream-1.img", 1 << 40)
    with pytest.raises(Refused, match="over 512 MiB"):
        imagedir.read(tmp_path)


def test_only_files_with_names_of_images_are_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "files.img").write_bytes(b"image")
    (tmp_path / "inventory.img").symlink_to(tmp_path / "secret")
    (tmp_path / "fdinfo-1.img").mkdir()
    os.mkfifo(tmp_path / "ids-1.img")
    assert imagedir.read(tmp_path) == {"files.img": b"image"}
