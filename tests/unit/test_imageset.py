"""The files of an image directory: what is written is read again, CRIU's own are read, nonsense is refused."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_tcpcp.core import criu, imageset
from criu_tcpcp.core.errors import ProtocolError
from criu_tcpcp.core.image import encode
from criu_tcpcp.core.imageset import Owner
from criu_tcpcp.core.state import ConnectionState
from states import plain, states

OWNER = Owner(42, "server", (7, 9))
OPTIONS = {"SO_SNDBUF": 87040, "SO_RCVBUF": 131072, "SO_RCVTIMEO": (0, 0), "SO_SNDTIMEO": (0, 0),
           "SO_BINDTODEVICE": "", "SO_ATTACH_FILTER": "", "SO_LINGER": (0, 0)}
STATE = plain(options=OPTIONS)
GOOD = imageset.write(encode(STATE, 1234), 1234, OWNER, b"greeting", {"id": "x"})


@given(states(), st.integers(1, 1 << 40), st.binary(max_size=20))
def test_what_is_written_is_read(state: ConnectionState, inode: int, app_state: bytes) -> None:
    files = imageset.write(encode(state, inode), inode, OWNER, app_state, {"id": "x"})
    assert all(imageset.WANTED.fullmatch(name) for name in files)
    (one,) = imageset.read(files)
    assert (one.flow, one.state, one.owners) == (state.flow, state.tcp_state.label, (OWNER,))
    assert (one.received, one.outgoing, one.app_state) == (state.received, state.outgoing, app_state)
    assert (one.whole, one.problem) == (True, "")
    assert imageset.about(files) == {"id": "x"}


def by_criu(name: str, entries: list[dict[str, Any]]) -> bytes:
    """An image as CRIU's own library makes it."""
    file = io.BytesIO()
    criu._import("pycriu.images").dump({"magic": name, "entries": entries}, file)
    return file.getvalue()


def socket_of(number: int, **changes: Any) -> dict[str, Any]:
    return {"id": number, "ino": 0xABC + number, "family": "INET", "type": "STREAM", "proto": "TCP",
            "state": "ESTABLISHED", "src_port": 80, "dst_port": 40000 + number, "flags": "0x2", "backlog": 0,
            "src_addr": ["192.0.2.1"], "dst_addr": ["198.51.100.2"],
            "fown": {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0},
            "opts": {"so_sndbuf": 87040, "so_rcvbuf": 131072, "so_snd_tmo_sec": 0, "so_snd_tmo_usec": 0,
                     "so_rcv_tmo_sec": 0, "so_rcv_tmo_usec": 0}, **changes}


def plain_directory() -> dict[str, bytes]:
    """Of a process 77 with two connections, one of which was dumped without its stream, a listener, a UDP socket, a
    file; and a child that has one of them too."""
    sockets = [socket_of(1), socket_of(2), socket_of(3, state="LISTEN"),
               socket_of(4, type="DGRAM", proto="UDP", state="CLOSE")]
    regular = {"id": 9, "flags": 0, "pos": 0, "fown": sockets[0]["fown"], "name": "/etc/hostname"}
    stream = {"inq_len": 3, "inq_seq": 1, "outq_len": 2, "outq_seq": 2, "opt_mask": "0x0", "snd_wscale": 0,
              "mss_clamp": 1460, "extra": {name: base64.b64encode(data).decode()
                                           for name, data in (("inq", b"abc"), ("outq", b"de"))}}
    ids = {"vm_id": 1, "fs_id": 1, "sighand_id": 1}

    def fds(*numbers: int) -> list[dict[str, Any]]:
        return [{"id": 9, "flags": 0, "type": "REG", "fd": 0}] + [
            {"id": number, "flags": 0, "type": "INETSK", "fd": 10 + number} for number in numbers]

    return {
        "inventory.img": by_criu("INVENTORY", [{"img_version": 2}]),
        "files.img": by_criu("FILES", [{"type": "REG", "id": 9, "reg": regular},
                                       *({"type": "INETSK", "id": one["id"], "isk": one} for one in sockets)]),
        "fdinfo-2.img": by_criu("FDINFO", fds(1, 2, 3, 4)), "fdinfo-3.img": by_criu("FDINFO", fds(1)),
        "ids-77.img": by_criu("IDS", [{**ids, "files_id": 2}]), "ids-78.img": by_criu("IDS", [{**ids, "files_id": 3}]),
        "tcp-stream-abd.img": by_criu("TCP_STREAM", [stream])}


def test_a_directory_of_crius_own() -> None:
    one, two = imageset.read(plain_directory())
    assert str(one.flow) == "192.0.2.1:80 <-> 198.51.100.2:40001"
    assert one.owners == (Owner(77, "", (11,)), Owner(78, "", (11,)))
    assert (one.received, one.outgoing, one.whole, one.problem) == (b"abc", b"de", False, "")
    assert two.owners == (Owner(77, "", (12,)),)
    assert two.problem == "there is no tcp-stream-abe.img"
    assert imageset.about(plain_directory()) == {}


#: Written by CRIU 4.2.1 on Linux 6.18: `criu dump --tcp-established` of a process with one connection, descriptor 7,
#: over loopback, in whose receive queue seven bytes wait.
BY_CRIU_4_2: dict[str, bytes] = {
    "fdinfo-2.img": bytes.fromhex(
        "19435654323721560800000008021000180120000800000008031000180120010800000008031000180120020800000008041000"
        "180420070900000008051000180220fb01"),
    "files.img": bytes.fromhex(
        "19435654383130564a000000080110011a440801100018002a0a08001000180020002800320b2f746d702f73657276657240f0c3"
        "2e50ed8302588081e57e58828cefc00258efefb0cb0158cdfdeed3055889d2d7af0328000000080110021a220802108080021800"
        "2a0a0800100018002000280032092f6465762f6e756c6c50b64328000000080110031a2208031081800218002a0a080010001800"
        "2000280032092f6465762f6e756c6c50b6437400000008041004226e080410b8c7b201180220012806300138a84640e4cc024802"
        "500058ff80800860ff8080086a0a08001000180020002800722a0880bcf001108080081800200028003000380140004801680070"
        "00880100900100980100b80100c801008201023840900102a20107180920a038284b1c00000008021005920115080510dcbab201"
        "1801220a080010001800200028001f000000080110061a190806100018002a0a0800100018002000280032012f50ed83011f0000"
        "00080110071a190807100018002a0a0800100018002000280032012f50ed8301"),
    "ids-24854.img": bytes.fromhex(
        "194356543020435418000000080210021802200228013002380340044806500758086005"),
    "inventory.img": bytes.fromhex(
        "163131584e000000080210011a18080110011801200128013002380340044806500758086005200128013000580162006a243639"
        "6562633066302d643861372d343039342d393337352d393338313032316266363732"),
    "tcp-stream-2ca3b8.img": bytes.fromhex(
        "194356540655465139000000080710bab99913180020f6b9f4810e2807300a38d7ff03400a48d2cf86c202600068bab999137080"
        "80047880800480018080048801bab9991372657175657374"),
}


def test_a_directory_that_criu_has_written() -> None:
    (one,) = imageset.read(BY_CRIU_4_2)
    assert str(one.flow) == "127.0.0.1:9000 <-> 127.0.0.1:42596"
    assert (one.inode, one.state, one.owners) == (0x2CA3B8, "ESTAB", (Owner(24854, "", (7,)),))
    assert (one.received, one.outgoing, one.whole, one.problem) == (b"request", b"", False, "")
    assert (one.stream.snd_wscale, one.stream.mss_clamp, one.stream.rcv_wnd) == (10, 65495, 65536)


def test_a_directory_of_a_criu_before_files_img() -> None:
    files = plain_directory() | {"inetsk.img": by_criu("INETSK", [socket_of(1), socket_of(3, state="LISTEN")])}
    del files["files.img"]
    (one,) = imageset.read(files)
    assert (one.received, one.owners[0].pid) == (b"abc", 77)


def test_many_connections_of_one_process() -> None:
    """Each descriptor is looked at once, and not once a connection."""
    count = 3000
    fds = [{"id": number, "flags": 0, "type": "INETSK", "fd": 10 + number} for number in range(1, count)]
    files = {"files.img": by_criu("FILES", [{"type": "INETSK", "id": number, "isk": socket_of(number)}
                                            for number in range(1, count)]),
             "fdinfo-2.img": by_criu("FDINFO", fds), "ids-77.img": plain_directory()["ids-77.img"]}
    assert [one.owners for one in imageset.read(files)] == [(Owner(77, "", (10 + number,)),)
                                                            for number in range(1, count)]


def test_two_sockets_that_claim_one_stream_are_refused() -> None:
    """Each would have a copy of it."""
    sockets = [socket_of(1), socket_of(2, ino=socket_of(1)["ino"])]
    with pytest.raises(ProtocolError, match="two sockets"):
        imageset.read({"files.img": by_criu("FILES", [{"type": "INETSK", "id": one["id"], "isk": one}
                                                      for one in sockets])})


@pytest.mark.parametrize(("changes", "words"), [
    ({"files.img": None}, "no files.img"), ({"files.img": b""}, "wrong magic"), ({"files.img": b"\0" * 100}, "magic"),
    ({"files.img": GOOD["files.img"][:-1]}, "cut short"), ({"files.img": GOOD["files.img"][:10]}, "cut short"),
    ({"files.img": GOOD["files.img"][:8] + b"\xff\xff\xff\xff" + b"x" * 99}, "cut short"),
    ({"files.img": GOOD["files.img"][:8] + b"\x04\0\0\0" + b"\xff" * 4}, "files.img: not an image"),
    ({"files.img": GOOD["inventory.img"]}, "wrong magic"),
    ({imageset.OURS: b"{"}, "cannot be read"), ({imageset.OURS: b"[]"}, "cannot be read"),
    ({imageset.OURS: b"[" * 100000}, "cannot be read"), ({imageset.OURS: b'{"version": 2}'}, "has version 2"),
    ({imageset.OURS: b'{"version": 1, "connections": [{}]}'}, "cannot be read"),
    ({imageset.OURS: GOOD[imageset.OURS].replace(b'"pid": 42', b'"pid": "x"')}, "wrong form")], ids=repr)
def test_what_is_no_image_directory_is_refused(changes: dict[str, bytes | None], words: str) -> None:
    files = {name: data for name, data in (GOOD | changes).items() if data is not None}
    with pytest.raises(ProtocolError, match=words):
        imageset.read(files)


@pytest.mark.parametrize("stream", [b"", b"x" * 100, GOOD["tcp-stream-4d2.img"][:-1]], ids=repr)
def test_a_damaged_stream_does_not_hide_the_connection(stream: bytes) -> None:
    (one,) = imageset.read(GOOD | {"tcp-stream-4d2.img": stream})
    assert one.flow == STATE.flow
    assert one.problem
    assert not one.whole


def test_extras_that_lie_make_it_less_than_whole() -> None:
    ours = json.loads(GOOD[imageset.OURS])
    ours["connections"][0]["extras"]["ts_recent"] = None
    (one,) = imageset.read(GOOD | {imageset.OURS: json.dumps(ours).encode()})
    assert not one.whole
    assert "timestamps" in one.problem


@given(st.sampled_from(sorted(GOOD)), st.integers(0, 1 << 16), st.integers(0, 255), st.booleans())
def test_damage_is_refused_or_shown(name: str, position: int, value: int, cut: bool) -> None:
    data = bytearray(GOOD[name])
    if cut:
        del data[position % len(data):]
    else:
        data[position % len(data)] = value
    try:
        found = imageset.read(GOOD | {name: bytes(data)})
    except ProtocolError:
        return
    assert name in (imageset.OURS, "files.img") or all(one.whole or one.problem for one in found)
