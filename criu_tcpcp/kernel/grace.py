"""A grace period: when `wait` returns, no packet is on its way past a rule that was there before.

A rule that was just added does not see the packets that other CPUs are already handling behind its hook. They are done
when every CPU has left its softirq; the kernel waits for exactly that (synchronize_net, expedited under rtnl) when an
interface goes down. So this keeps a TUN interface in a network namespace of its own and takes it up and down: 0.16 ms
idle, 0.2 ms busy, where membarrier(2), the fallback, takes 5 to 13 ms. What is in a socket's backlog after that is
worked off by any call that takes the socket's lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct

from ..core.errors import KernelError
from . import netns
from .syscalls import failing, membarrier_global

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1  # linux/sockios.h, linux/if.h
_NAME = b"grace0"


class GracePeriod:
    """Made before the freeze (a namespace costs milliseconds); the calling thread is back in its own afterwards."""

    def __init__(self) -> None:
        self._tun = -1
        self._control: socket.socket | None = None
        with contextlib.suppress(KernelError), netns.private():
            self._make_interface()

    @property
    def fast(self) -> bool:
        """There is a TUN interface."""
        return self._control is not None

    def _make_interface(self) -> None:
        """The device belongs to the namespace in which /dev/net/tun was opened, and goes when the descriptor is
        closed."""
        with failing("open /dev/net/tun"):
            tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            with failing("TUNSETIFF"):
                fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", _NAME, _IFF_TUN | _IFF_NO_PI))
                self._control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        except BaseException:
            os.close(tun)
            raise
        self._tun = tun

    def wait(self) -> None:
        """Return when every packet that was past the rules at the call has been handled."""
        if self._control is None:
            membarrier_global()
            return
        with failing("SIOCSIFFLAGS"):
            for flags in (_IFF_UP, 0):
                fcntl.ioctl(self._control, _SIOCSIFFLAGS, struct.pack("16sH22x", _NAME, flags))

    def close(self) -> None:
        if self._control is not None:
            self._control.close()
            os.close(self._tun)
            self._control = None
