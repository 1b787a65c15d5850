"""What runs inside the link process for a target over SSH: getting there, and the stream. `run` does both.

Where the way leads, and whether the right host is at its end, is decided in ssh_config.py and known_hosts.py. A jump
host's direct-tcpip channel is the next hop's socket; a ProxyCommand has one end of a socketpair as its stdin and
stdout. All of it is bounded by one deadline.

The stream: one thread a direction, each blocked in the read of its side and waking at once.

    user --data--> [feeder: data.recv -> channel.send]            --> far command's stdin
    user <--data-- [main:   channel.recv -> data.sendall]         <-- its stdout
    Tail <-------- [stderr: channel.recv_stderr]                  <-- its stderr
    [watch: the user has closed -> drain, leave]

A feeder that waits for a window which a far command never opens cannot see that the user has gone; the watch can, and
ends the process under it. A dead network shows in TCP_USER_TIMEOUT: keepalive messages leave every `KEEPALIVE_S`, and
their acknowledgements stay away.

Only the link process imports this module: nothing else of the project imports paramiko.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from select import poll
from typing import NoReturn

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from paramiko.pkey import UnknownKeyType

from ..core.errors import LinkError
from ..kernel.syscalls import go_first
from .known_hosts import KnownKey, judge, known_keys
from .link import DRAIN_S, Ending, Reporter, Tail
from .ssh_config import Hop, read_config, resolve
from .target import Target

KEEPALIVE_S = 5
_DEAD_NETWORK_MS = 15000  # TCP_USER_TIMEOUT: three keepalives without an acknowledgement
_CHUNK = 32704  # what fits into one message of OpenSSH's channel: its packet size, 32768, less paramiko's allowance
_CIPHERS = ("aes256-gcm@openssh.com", "aes128-gcm@openssh.com", "aes256-ctr", "aes192-ctr", "aes128-ctr")
_EXIT_STATUS_S = 0.5  # sshd sends EOF when stdout closes, and the status when the process has ended


def run(target: Target, data: socket.socket, report: Reporter, deadline: float) -> None:
    """Connect, start the far command, and carry bytes until one side ends. `deadline` is of time.monotonic.

    Raises LinkError before the report "connected", nothing after it.
    """
    logging.getLogger("paramiko").addHandler(logging.NullHandler())
    logging.getLogger("paramiko").propagate = False
    threading.excepthook = lambda args: None
    drained = threading.Event()
    over = threading.Event()
    pumping = threading.Event()
    threading.Thread(target=_watch, args=(data, pumping, drained, over), daemon=True).start()
    home = os.path.expanduser("~")
    hops = resolve(target, home, read_config(target, home))
    transports: list[paramiko.Transport] = []
    peer_address = None
    words: threading.Thread | None = None  # what a ProxyCommand says on stderr
    for hop in hops:
        carrier: socket.socket | paramiko.Channel
        if transports:
            carrier = _through(transports[-1], hop, deadline)
            peer_address = None
        elif hop.proxy_command is not None:
            carrier, words = _proxy(hop.proxy_command, report.tail)
        else:
            carrier = _connect(hop, deadline)
            peer_address = str(carrier.getpeername()[0]).removeprefix("::ffff:")
        try:
            transports.append(_open_transport(hop, carrier, deadline))
        except LinkError as error:
            if words is None or transports:
                raise
            words.join(_EXIT_STATUS_S)
            said = "".join(f": {line}" for line in report.tail.lines()[-1:])
            raise LinkError(f"{error.message}; its ProxyCommand{said or ' said nothing'}", hint=error.hint) from error
        _authenticate(transports[-1], hop, deadline)
    channel = _start_command(transports[-1], hops[-1], f"{target.remote_command} serve", deadline)
    go_first()
    pumping.set()
    threading.Thread(target=_feed, args=(data, channel, drained), daemon=True).start()
    listener = threading.Thread(target=_listen, args=(channel, report.tail), daemon=True)
    listener.start()
    report.connected(peer_address)
    _deliver(channel, data)
    channel.status_event.wait(_EXIT_STATUS_S)
    listener.join(_EXIT_STATUS_S)
    report.ended(_ending(channel, transports))
    over.set()
    with contextlib.suppress(OSError):
        data.shutdown(socket.SHUT_RDWR)
        while data.recv(_CHUNK, socket.MSG_DONTWAIT):  # unread bytes would turn the user's EOF into ECONNRESET
            pass


def _watch(data: socket.socket, pumping: threading.Event, drained: threading.Event, over: threading.Event) -> None:
    """Wait until the user has closed, then end the process, once what was written has left or `DRAIN_S` is over."""
    poller = poll()
    poller.register(data, 0)  # POLLHUP and POLLERR alone
    poller.poll()
    deadline = time.monotonic() + DRAIN_S
    if pumping.is_set() and drained.wait(DRAIN_S):
        over.wait(max(deadline - time.monotonic(), 0))  # the far command sees EOF, and ends
    os._exit(0)


def _feed(data: socket.socket, channel: paramiko.Channel, drained: threading.Event) -> None:
    """The user's bytes to the far command; the user's EOF, or end, becomes its EOF."""
    with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
        while chunk := data.recv(_CHUNK):
            channel.sendall(chunk)
    with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
        channel.shutdown_write()
    drained.set()


def _deliver(channel: paramiko.Channel, data: socket.socket) -> None:
    """The far command's bytes to the user, until the far side ends; bytes for a user who has gone are dropped."""
    gone = False
    while chunk := channel.recv(4 * _CHUNK):
        if not gone:
            try:
                data.sendall(chunk)
            except OSError:
                gone = True


def _listen(channel: paramiko.Channel, tail: Tail) -> None:
    while words := channel.recv_stderr(4096):
        tail.write(words)


def _ending(channel: paramiko.Channel, transports: list[paramiko.Transport]) -> Ending:
    if channel.exit_status >= 0:
        return Ending(f"the far command ended with status {channel.exit_status}", channel.exit_status)
    if channel.eof_received and transports[-1].is_active():
        return Ending("the far command closed its stdout, or was killed", None)
    causes = [error for error in (transport.get_exception() for transport in transports) if error]
    if not causes or isinstance(causes[0], EOFError):  # paramiko makes an EOFError of ETIMEDOUT as well
        return Ending("the SSH connection broke: the host closed it, or does not answer any more", None)
    return Ending(f"the SSH connection broke: {_in_words(causes[0])}", None)


def _connect(hop: Hop, deadline: float) -> socket.socket:
    """A TCP connection to the hop, at the first of its addresses that answers."""
    where = f"{hop.host} port {hop.port}"
    until = min(deadline, time.monotonic() + (hop.connect_timeout_s or float("inf")))
    try:
        addresses = socket.getaddrinfo(hop.host, hop.port, hop.family, socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        words = error.strerror if isinstance(error, OSError) else "not a name"
        raise LinkError(f"{hop.host}: no such host: {words}") from error
    first: OSError | None = None
    for number, (family, kind, protocol, _, address) in enumerate(addresses):
        end = socket.socket(family, kind, protocol)
        try:
            end.settimeout(max((until - time.monotonic()) / (len(addresses) - number), 0.001))
            end.connect(address)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_NETWORK_MS)
        except OSError as error:
            end.close()
            first = first or error
            continue
        return end
    if isinstance(first, ConnectionRefusedError):
        raise LinkError(f"{where}: connection refused", hint="is sshd running there, on that port?") from first
    if isinstance(first, TimeoutError):
        raise LinkError(f"{where}: no answer in time", hint="--timeout waits longer") from first
    raise LinkError(f"{where}: {_in_words(first) if first else 'no address'}") from first


def _proxy(command: str, tail: Tail) -> tuple[socket.socket, threading.Thread]:
    """The stdin and stdout of a ProxyCommand, and who listens to its stderr; it ends by EOF when this process does."""
    ours, theirs = socket.socketpair()
    shell = ["/bin/sh", "-c", f"exec {command}"]
    process = subprocess.Popen(shell, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.PIPE)
    theirs.close()
    assert process.stderr is not None
    stderr = process.stderr.fileno()

    def listen() -> None:
        while chunk := os.read(stderr, 4096):
            tail.write(chunk)
        process.wait()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    return ours, listener


def _through(transport: paramiko.Transport, hop: Hop, deadline: float) -> paramiko.Channel:
    """A channel of the jump host to the next hop."""
    try:
        return transport.open_channel(
            "direct-tcpip", (hop.host, hop.port), ("127.0.0.1", 0), timeout=_left_s(hop, deadline)
        )
    except paramiko.ChannelException as error:
        raise LinkError(f"{hop}: the jump host does not get there: {error.text}") from error
    except (paramiko.SSHException, OSError, EOFError) as error:
        raise LinkError(f"{hop}: no way through the jump host: {_in_words(error)}") from error


def _look_up(hop: Hop) -> list[KnownKey]:
    texts = []
    for path in hop.known_hosts:
        with contextlib.suppress(OSError):
            texts.append((path, Path(path).read_text(errors="replace")))
    return known_keys(texts, hop.known_hosts_name)


def _open_transport(hop: Hop, carrier: socket.socket | paramiko.Channel, deadline: float) -> paramiko.Transport:
    """An SSH transport whose server is the right one."""
    known = _look_up(hop)
    left_s = _left_s(hop, deadline)
    try:
        transport = paramiko.Transport(carrier)
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = left_s
        transport.use_compression(False)
        options = transport.get_security_options()
        options.ciphers = _first(_CIPHERS, options.ciphers)
        options.key_types = _first(_offers(known), options.key_types)
        transport.start_client(timeout=left_s)
        if not transport.initial_kex_done:
            raise TimeoutError("no SSH answer in time")
        key = transport.get_remote_server_key()
    except (paramiko.SSHException, OSError, EOFError) as error:
        raise LinkError(f"{hop}: no SSH connection: {_in_words(error)}") from error
    judge(hop, known, key.get_name(), key.get_base64())
    transport.set_keepalive(KEEPALIVE_S)
    return transport


def _first(preferred: Iterable[str], offered: Iterable[str]) -> tuple[str, ...]:
    offered = tuple(offered)
    front = [name for name in preferred if name in offered]
    return tuple(dict.fromkeys([*front, *offered]))


def _offers(known: list[KnownKey]) -> list[str]:
    """The signature algorithms of the known keys: the server shows the key that we ask for, if it has it."""
    rsa = ("rsa-sha2-512", "rsa-sha2-256")
    per_key = (rsa if key.key_type == "ssh-rsa" else (key.key_type,) for key in known if not key.revoked)
    return list(itertools.chain.from_iterable(per_key))


def _authenticate(transport: paramiko.Transport, hop: Hop, deadline: float) -> None:
    """Public keys only: those of the files that the target names, the agent's, those of other files."""
    tried: list[str] = []
    unusable: list[str] = []
    why = ""
    for label, key in _keys(hop, unusable):
        transport.auth_timeout = _left_s(hop, deadline)
        try:
            more = transport.auth_publickey(hop.user, key)
        except paramiko.BadAuthenticationType as error:
            raise LinkError(
                f"{hop}: authentication failed: the server takes no public keys, but {', '.join(error.allowed_types)}"
            ) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            tried.append(label)
            if not transport.is_active():
                why = f"; the server ended it: {_in_words(error)}"
                break
            continue
        if more:
            raise LinkError(f"{hop}: authentication failed: beside a key the server wants {', '.join(more)}")
        return
    if not tried and _needs_no_key(transport, hop):
        return
    told = ", ".join(tried) if tried else "none"
    also = f"; unusable: {', '.join(unusable)}" if unusable else ""
    raise LinkError(
        f"{hop}: authentication failed; keys tried: {told}{also}{why}",
        hint="name a key with -i, or add it to the SSH agent",
    )


def _needs_no_key(transport: paramiko.Transport, hop: Hop) -> bool:
    """Some servers know who we are from the network."""
    try:
        return not transport.auth_none(hop.user)
    except (paramiko.SSHException, OSError, EOFError):
        return False


def _keys(hop: Hop, unusable: list[str]) -> Iterator[tuple[str, paramiko.PKey]]:
    """(what to call it, key), in the order to try; files without a usable key are told in `unusable`.

    Raises LinkError when a file that the target names does not exist.
    """
    agent_keys = _agent_keys(hop)
    seen: set[bytes] = set()
    locked: list[tuple[str, bytes]] = []
    configured: list[tuple[str, paramiko.PKey]] = []
    for path in hop.identity_files:
        required = path in hop.required_files
        try:
            key = paramiko.PKey.from_path(path)
        except FileNotFoundError as error:
            if required:
                raise LinkError(f"key file {path} does not exist") from error
        except (TypeError, paramiko.PasswordRequiredException):  # cryptography's word for: encrypted
            locked.append((path, _public_half(path)))
        except (OSError, ValueError, paramiko.SSHException, UnknownKeyType, UnsupportedAlgorithm) as error:
            why = "not a private key" if isinstance(error, ValueError) else _in_words(error)
            if required:
                raise LinkError(f"key file {path} cannot be used: {why}") from error
            unusable.append(f"{path} ({why})")
        else:
            if required:
                seen.add(key.asbytes())
                yield path, key
            else:
                configured.append((path, key))
    named = {public for _, public in locked} | {key.asbytes() for _, key in configured} | seen
    for path, public in locked:
        if not any(key.asbytes() == public for _, key in agent_keys):
            unusable.append(f"{path} (encrypted, and the SSH agent does not hold it)")
    agent_keys.sort(key=lambda entry: entry[1].asbytes() not in named)  # stable: those that were asked for come first
    for label, key in agent_keys:
        if key.asbytes() not in seen and (key.asbytes() in named or not hop.identities_only):
            seen.add(key.asbytes())
            yield label, key
    for path, key in configured:
        if key.asbytes() not in seen:
            seen.add(key.asbytes())
            yield path, key


def _agent_keys(hop: Hop) -> list[tuple[str, paramiko.PKey]]:
    if hop.agent is not None:
        os.environ["SSH_AUTH_SOCK"] = hop.agent
    if not os.environ.get("SSH_AUTH_SOCK"):
        return []
    try:
        return [(f"agent's {key.comment or key.get_name()}", key) for key in paramiko.Agent().get_keys()]
    except (paramiko.SSHException, OSError):
        return []


def _public_half(path: str) -> bytes:
    """What stands in the file beside an encrypted key; empty if none is there."""
    try:
        return base64.b64decode(Path(f"{path}.pub").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return b""


def _start_command(transport: paramiko.Transport, hop: Hop, command: str, deadline: float) -> paramiko.Channel:
    try:
        channel = transport.open_session(timeout=_left_s(hop, deadline))
        channel.exec_command(command)
    except (paramiko.SSHException, OSError, EOFError) as error:
        raise LinkError(f"{hop}: the server starts no command: {_in_words(error)}") from error
    return channel


def _left_s(hop: Hop, deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        _too_late(hop)
    return left_s


def _too_late(hop: Hop) -> NoReturn:
    raise LinkError(f"{hop}: not connected in time", hint="--timeout waits longer")


def _in_words(error: BaseException) -> str:
    """An exception on one line, without Python's errno decoration."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, EOFError) and not str(error):
        return "the other end closed the connection"
    return " ".join(str(error).split()) or type(error).__name__
