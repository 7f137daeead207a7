"""A thread that looks after what a sender has left under way, also when nobody calls the sender again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

LOOK_EVERY_S: Final = 0.25  # chosen: how soon a broker that went away after the last message is noticed


class Watcher:
    """Calls ``look`` each quarter of a second from ``wake`` on, until it returns False."""

    def __init__(self, look: Callable[[], bool], name: str) -> None:
        self._look = look
        self._name = name
        self._thread: threading.Thread | None = None
        self._awake = threading.Event()
        #: Whether somebody looks anyway, so that nobody need ``wake`` it.
        self.is_awake = False

    def wake(self) -> None:
        """See to it that somebody looks."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self.is_awake = True
        self._awake.set()

    def after_fork(self) -> None:
        """In a forked child: the thread is the parent's."""
        self._thread = None
        self._awake = threading.Event()
        self.is_awake = False

    def _run(self) -> None:
        while True:
            self._awake.wait()
            time.sleep(LOOK_EVERY_S)
            # Lowered before looking: what is sent from here on raises it again.
            self._awake.clear()
            self.is_awake = False
            if self._look():
                self.is_awake = True
                self._awake.set()
