"""Servers of others, which know nothing of passes: how one is started, asked, and told from another of its kind.

Each has a name and a directory of that name. Its answers tell which of its kind it is, and its log whom it served.
"""

from __future__ import annotations

import http.client
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from world import PORT

_FOR_EVER = 10**9  # requests of one client


def logged(directory: Path, argv: list[str]) -> list[str]:
    """With all that it says in a file: a pipe that nobody reads fills up, and then the server waits."""
    return ["sh", "-c", 'exec "$@" >>"$0" 2>&1', str(directory / "log"), *argv]


def place(directory: Path, name: str) -> Path:
    made = directory / name
    made.mkdir()
    return made


# -- Redis -------------------------------------------------------------------------------------------------------------

def redis(directory: Path, name: str, port: int = PORT) -> list[str]:
    data = place(directory, name)
    return logged(data, ["redis-server", "--port", str(port), "--bind", "0.0.0.0", "::", "--protected-mode", "no",
                         "--save", "", "--dir", str(data), "--loglevel", "verbose"])


def received(peer: socket.socket) -> bytes:
    data = peer.recv(65536)
    assert data, "end of stream"
    return data


def ask(peer: socket.socket, *words: str) -> str:
    """One Redis command, and its whole answer (RESP: a line, or a length and that many bytes)."""
    peer.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in words))
    got = b""
    while not _is_whole(got):
        got += received(peer)
    return got.decode().rstrip()


def _is_whole(answer: bytes) -> bool:
    line, end, rest = answer.partition(b"\r\n")
    return bool(end) and (not line.startswith(b"$") or line == b"$-1" or len(rest) == int(line[1:]) + 2)


def field(answer: str, name: str, mark: str) -> str:
    """Of an answer that consists of such words."""
    return next(word for word in answer.split() if word.startswith(name + mark)).removeprefix(name + mark)


def run_id(peer: socket.socket) -> str:
    """Redis also tells whom it takes the client for."""
    address, port = peer.getsockname()[:2]
    name = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    assert field(ask(peer, "CLIENT", "INFO"), "addr", "=") == name
    return field(ask(peer, "INFO", "server"), "run_id", ":")


# -- Web servers -------------------------------------------------------------------------------------------------------

def nginx(directory: Path, name: str, port: int = PORT) -> list[str]:
    """Two workers."""
    data = place(directory, name)
    paths = "".join(f"{kind}_temp_path {data}/{kind};" for kind in (
        "client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (data / "conf").write_text(f"""
        user root; worker_processes 2; daemon off; pid {data}/pid; error_log {data}/errors info;
        events {{ }}
        http {{ {paths} log_format who '$remote_addr $remote_port $request'; access_log {data}/log who;
               keepalive_requests {_FOR_EVER};
               server {{ listen {port}; listen [::]:{port}; location / {{ return 200 {name}; }} }} }}""")
    return ["nginx", "-c", str(data / "conf"), "-e", str(data / "errors")]


def http_server(directory: Path, name: str, port: int = PORT) -> list[str]:
    """Its HTTP/1.0, without the option, would end each connection."""
    data = place(directory, name)
    (data / "index.html").write_text(name)
    return logged(data, [sys.executable, "-m", "http.server", "--protocol", "HTTP/1.1", "--directory", str(data),
                         str(port)])


def haproxy(directory: Path, name: str, port: int = PORT) -> list[str]:
    """It answers by itself, and keeps the client's connection in any case."""
    data = place(directory, name)
    (data / "conf").write_text(f"""
global
    log stdout format raw local0
defaults
    mode http
    timeout client 1h
    timeout connect 1h
    timeout server 1h
frontend all
    bind 0.0.0.0:{port}
    bind :::{port} v6only
    log global
    log-format "%ci %cp %HM"
    http-request return status 200 content-type text/plain string {name}
""")
    return logged(data, ["haproxy", "-db", "-f", str(data / "conf")])


def node(directory: Path, name: str, port: int = PORT) -> list[str]:
    return logged(place(directory, name), ["node", str(Path(__file__).parent / "answering.js"), name, str(port)])


def node_exporter(directory: Path, name: str, port: int = PORT) -> list[str]:
    """A Go server; what it exports is its name."""
    data = place(directory, name)
    (data / "name.prom").write_text(f'name{{is="{name}"}} 1\n')
    return logged(data, ["prometheus-node-exporter", f"--web.listen-address=:{port}", "--collector.disable-defaults",
                         "--collector.textfile", f"--collector.textfile.directory={data}", "--log.level=debug",
                         "--web.disable-exporter-metrics"])


def exported(peer: socket.socket) -> str:
    return field(get(peer, "/metrics"), 'name{is="', "")


def get(peer: socket.socket, path: str = "/") -> str:
    """The body of the answer to one request on this connection."""
    peer.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    with http.client.HTTPResponse(peer) as answer:
        answer.begin()
        assert answer.status == 200
        return answer.read().decode()


# -- all of them -------------------------------------------------------------------------------------------------------

class Kind(NamedTuple):
    """`start`: the command of one, by the directory for its own, its name and its port. `who`: the one that answers on
    this connection. `entry`: what its log has at least once for a client that it served ({address}, {port}); nothing
    of a program that logs none."""

    start: Callable[[Path, str, int], list[str]]
    who: Callable[[socket.socket], str]
    entry: str


KINDS = {
    "redis": Kind(redis, run_id, "Accepted {address}:{port}"),
    "nginx": Kind(nginx, get, "{address} {port} GET"),
    "http.server": Kind(http_server, get, "{address} - - ["),
    "haproxy": Kind(haproxy, get, "{address} {port} GET"),
    "node": Kind(node, get, "{address} {port} GET"),
    "go": Kind(node_exporter, exported, ""),
}
