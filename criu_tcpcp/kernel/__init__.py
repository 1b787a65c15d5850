"""The only home of ctypes, setsockopt, ptrace and netlink. An OSError never leaves it: it becomes a `KernelError`."""
