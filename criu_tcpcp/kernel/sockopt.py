"""Read and write the options of `core.options.TABLE` on a socket."""

from __future__ import annotations

import errno
import socket
import struct
import sys

from ..core.endpoint import Protocol
from ..core.errors import KernelError
from ..core.options import BY_NAME, Form, Missing, Option, OptionValue, applying
from .syscalls import failing

_SIZES = {Form.INT: 4, Form.TIMEVAL: 16, Form.LINGER: 8, Form.TEXT: 32}
_FORMATS = {Form.TIMEVAL: "=qq", Form.LINGER: "=ii"}


def read(sock: socket.socket, option: Option) -> OptionValue:
    """The option's value. KernelError names it."""
    with failing(f"getsockopt({option.name})"):
        data = sock.getsockopt(option.level, option.number, _SIZES[option.form])
    if option.form is Form.TEXT:
        return data.split(b"\0")[0].decode()
    if option.form is Form.INT:
        return int.from_bytes(data[:4], sys.byteorder, signed=True)
    first, second = struct.unpack(_FORMATS[option.form], data)
    return (first, second)


def read_all(sock: socket.socket) -> dict[str, OptionValue]:
    """Every option of the table that this kernel knows."""
    found: dict[str, OptionValue] = {}
    protocol = Protocol.UDP if sock.type == socket.SOCK_DGRAM else Protocol.TCP
    for option in applying(sock.family, protocol=protocol):
        try:
            found[option.name] = read(sock, option)
        except KernelError as error:
            if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
                raise
    return found


def write(sock: socket.socket, name: str, value: OptionValue) -> None:
    """Make the option have this value; does nothing where it has it."""
    option = BY_NAME[name]
    if read(sock, option) == value:
        return
    with failing(f"setsockopt({name})"):
        sock.setsockopt(option.level, option.write_number or option.number, packed(option, value))


def packed(option: Option, value: OptionValue) -> bytes:
    """The value as the kernel takes it."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, tuple):
        return struct.pack(_FORMATS[option.form], *value)
    return struct.pack("=i", value // 2 if option.write_halved else value)


def write_or_report(sock: socket.socket, name: str, value: OptionValue) -> str | None:
    """As `write`; where the kernel refuses and the table says that this is harmless, the line for the report."""
    try:
        write(sock, name, value)
    except KernelError as error:
        if BY_NAME[name].missing is Missing.REFUSE:
            raise
        return f"{name} = {value} could not be set: {error.message}"
    return None
