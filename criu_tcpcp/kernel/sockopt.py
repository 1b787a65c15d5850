"""Read and write the options of `core.options.TABLE` on a socket."""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
import sys

from ..core.endpoint import Protocol
from ..core.errors import KernelError
from ..core.options import BY_NAME, Form, Missing, Option, OptionValue, applying
from .syscalls import check, failing, libc

_SIZES = {Form.INT: 4, Form.LONG: 8, Form.PAIR: 8, Form.TIMEVAL: 16, Form.LINGER: 8, Form.TEXT: 32}
_FORMATS = {Form.TIMEVAL: "=qq", Form.LINGER: "=ii", Form.PAIR: "=iI"}
_LONGEST_BYTES = 40  # of IP options (RFC 791 3.1)
_INSTRUCTION = 8  # struct sock_filter
_SO_GET_FILTER, _SO_DETACH_FILTER = 26, 27
_UNKNOWN = (errno.ENOPROTOOPT, errno.EOPNOTSUPP)


def read(sock: socket.socket, option: Option) -> OptionValue:
    """The option's value. KernelError names it; EACCES for a filter that is no classic one."""
    with failing(f"getsockopt({option.name})"):
        return _read(sock, option)


def _read(sock: socket.socket, option: Option) -> OptionValue:
    """As `read`; OSError."""
    if option.form in (Form.BYTES, Form.FILTER):
        return _read_bytes(sock, option).hex()
    data = sock.getsockopt(option.level, option.number, _SIZES[option.form])
    if option.form is Form.TEXT:
        return data.split(b"\0")[0].decode()
    if option.form is Form.INT:
        return int.from_bytes(data[:4], sys.byteorder, signed=True) & option.mask
    if option.form is Form.LONG:
        return int.from_bytes(data, sys.byteorder)
    if option.form is Form.PAIR:  # SO_TIMESTAMPING: an int before Linux 5.14 (d463126e23f1)
        data = data.ljust(_SIZES[Form.PAIR], b"\0")
    first, second = struct.unpack(_FORMATS[option.form], data)
    return (first, second)


def _read_bytes(sock: socket.socket, option: Option) -> bytes:
    """Python's getsockopt does not know that a filter's length is told in
    instructions (net/core/filter.c, sk_get_filter)."""
    is_filter = option.form is Form.FILTER
    unit = _INSTRUCTION if is_filter else 1
    size = ctypes.c_uint32(0 if is_filter else _LONGEST_BYTES)
    if is_filter:  # how many there are
        check(f"getsockopt({option.name})",
              libc.getsockopt(sock.fileno(), option.level, option.number, None, ctypes.byref(size)))
        if not size.value:
            return b""
    buffer = ctypes.create_string_buffer(size.value * unit)
    check(f"getsockopt({option.name})",
          libc.getsockopt(sock.fileno(), option.level, option.number, buffer, ctypes.byref(size)))
    return buffer.raw[:size.value * unit]


def read_all(sock: socket.socket) -> dict[str, OptionValue]:
    """Every option of the table that this kernel knows."""
    found: dict[str, OptionValue] = {}
    protocol = Protocol.UDP if sock.type == socket.SOCK_DGRAM else Protocol.TCP
    for option in applying(sock.family, protocol=protocol):
        try:
            found[option.name] = _read(sock, option)
        except (OSError, KernelError) as error:
            if error.errno not in _UNKNOWN:
                with failing(f"getsockopt({option.name})"):
                    raise
    return found


def has_hidden_filter(sock: socket.socket) -> bool:
    """Its filter is no classic program: the kernel does not show it (net/core/filter.c, sk_get_filter)."""
    size = ctypes.c_uint32(0)
    answer = libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, _SO_GET_FILTER, None, ctypes.byref(size))
    return answer == -1 and ctypes.get_errno() == errno.EACCES


def write(sock: socket.socket, name: str, value: OptionValue) -> None:
    """Make the option have this value; does nothing where it has it."""
    option = BY_NAME[name]
    if read(sock, option) == value:
        return
    with failing(f"setsockopt({name})"):
        if option.form is Form.FILTER and isinstance(value, str):
            _attach(sock, option, bytes.fromhex(value))
        else:
            sock.setsockopt(option.level, option.write_number or option.number, packed(option, value))


def _attach(sock: socket.socket, option: Option, program: bytes) -> None:
    """struct sock_fprog points to the instructions."""
    if not program:
        sock.setsockopt(option.level, _SO_DETACH_FILTER, 0)
        return
    instructions = ctypes.create_string_buffer(program, len(program))
    sock.setsockopt(option.level, option.number,
                    struct.pack("@HP", len(program) // _INSTRUCTION, ctypes.addressof(instructions)))


def packed(option: Option, value: OptionValue) -> bytes:
    """The value as the kernel takes it."""
    if isinstance(value, str):
        return bytes.fromhex(value) if option.form is Form.BYTES else value.encode()
    if isinstance(value, tuple):
        return struct.pack(_FORMATS[option.form], *value)
    if option.form is Form.LONG:
        return struct.pack("=Q", value)
    return struct.pack("=i", value // 2 if option.write_halved else value)


def write_or_report(sock: socket.socket, name: str, value: OptionValue) -> str | None:
    """As `write`; where the kernel refuses and the table says that this is harmless, the line for the report. What this
    kernel does not know, and was not in use, is not missed."""
    try:
        write(sock, name, value)
    except KernelError as error:
        if error.errno in _UNKNOWN and value in (0, "", (0, 0)):
            return None
        if BY_NAME[name].missing is Missing.REFUSE:
            raise
        return f"{name} = {value} could not be set: {error.message}"
    return None
