"""Waking a thread that polls descriptors: one more of them, that other threads write to."""

from __future__ import annotations

import os


class Waker:
    """Wakes a thread that polls it. A descriptor of this process's own; a forked child makes another one."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __del__(self) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        """Return what to poll for reading."""
        return self._fd

    def wake(self) -> None:
        """Make the next poll return, or the one that waits."""
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Let the next poll wait again; call it when a poll has returned."""
        os.eventfd_read(self._fd)
