"""The one process that a program may want beside its children, such as a beat: started again whenever it ends.

The zygote forks it and reports its end; here is decided what follows. It takes no calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from typing import Final

from fastq.pool.zygote import COMPANION, Exited, Failed, Spawned, Zygote

logger = logging.getLogger("fastq.worker")

FIRST_PAUSE_S: Final = 1.0
LAST_PAUSE_S: Final = 60.0
STOP_S: Final = 5.0  # chosen: to write a schedule file, or a row


class Companion:
    """Keeps the process alive. ``name`` is what the log calls it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, zygote: Zygote, name: str) -> None:
        self._loop = loop
        self._zygote = zygote
        self._name = name
        self._pidfd = -1
        self._pid = 0
        self._began = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._timer: asyncio.TimerHandle | None = None
        self._is_stopping = False
        self._ended = asyncio.Event()
        self._ended.set()

    def start(self) -> None:
        """Ask for the process."""
        self._began = self._loop.time()
        try:
            self._zygote.spawn_companion()
        except OSError as error:
            self._over(f"could not be started: {error}")
        else:
            self._ended.clear()

    def take(self, report: Spawned | Failed | Exited) -> bool:
        """Act on a report of the zygote; return whether it was about this process."""
        if isinstance(report, Exited):
            if report.pid != self._pid:
                return False
            self._forget()
            self._over(f"has ended ({report.reason})")
        elif report.request != COMPANION:
            return False
        elif isinstance(report, Failed):
            self._over(f"could not be forked: {report.reason}")
        else:
            self._pid = report.pid
            with contextlib.suppress(ProcessLookupError):  # it has ended already; the report is on its way
                self._pidfd = os.pidfd_open(report.pid)
            if self._is_stopping:
                self._signal(signal.SIGTERM)
        return True

    def ask_stop(self) -> None:
        """Ask the process to end, and do not start it again; does not wait."""
        self._is_stopping = True
        if self._timer is not None:
            self._timer.cancel()
        self._signal(signal.SIGTERM)

    async def stop(self) -> None:
        """End the process; what it keeps has been written when this returns."""
        self.ask_stop()
        try:
            await asyncio.wait_for(self._ended.wait(), STOP_S)
        except (TimeoutError, asyncio.TimeoutError):
            logger.warning("%s, pid:%d, has not ended within %g s and is killed", self._name, self._pid, STOP_S)
            self._signal(signal.SIGKILL)

    def lose(self) -> None:
        """The zygote is gone; the kernel has asked the process to end with it."""
        self._forget()
        self._is_stopping = True
        self._ended.set()

    def _over(self, what: str) -> None:
        self._ended.set()
        if self._is_stopping:
            return
        if self._loop.time() - self._began > LAST_PAUSE_S:
            self._pause_s = FIRST_PAUSE_S
        logger.error("%s %s; it starts again in %g s", self._name, what, self._pause_s)
        self._timer = self._loop.call_later(self._pause_s, self.start)
        self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)

    def _forget(self) -> None:
        self._pid = 0
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _signal(self, number: int) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
