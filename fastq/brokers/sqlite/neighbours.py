"""The workers that have one SQLite file open, as one of them sees it: who has died, and who has come under its name."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence
from functools import partial

from fastq.brokers.sqlite import tables
from fastq.brokers.sqlite.bells import WORKER, Bell
from fastq.brokers.sqlite.client import OpenFile
from fastq.brokers.sqlite.tables import WorkerInfo
from fastq.bus import NAMESAKE
from fastq.errors import ConnectionLost

logger = logging.getLogger("fastq.transport.sqlite_thread")


class Neighbours:
    """They know each other by their bells: one that is bound by nobody any more was a dead worker's."""

    def __init__(self, file: OpenFile, path: str) -> None:
        self._file = file
        self._path = path
        #: Our number in the file, 0 before we ``join``, and our bell.
        self.me = 0
        self.bell: Bell | None = None
        self.is_alone = False  # no other worker was there at the last look
        self._namesakes: set[int] = set()  # workers that have our name
        self._missing: set[int] = set()  # workers whose bell was not there at the last look

    def join(self, name: str, queues: Sequence[str]) -> Bell:
        """Write ourselves into the file, again if we are there, look after the others, and return our bell."""
        file = self._file
        if self.bell is None:
            self.bell = file.folder.bind(WORKER)
        info = WorkerInfo(0, name, socket.gethostname(), os.getpid(), self.bell.name, tuple(queues), time.time())
        self.me = file.transaction(partial(tables.put_worker, file.cursor, self.me, info))
        self._look()
        return self.bell

    def check(self) -> bool:
        """See that our bell is there, and look after the others; return whether there are messages given back."""
        if self.bell is None:
            return False
        self._file.folder.restore(self.bell)
        return self._look()

    def _look(self) -> bool:
        """Give back what dead workers hold, and warn of one that has come under our name."""
        file = self._file
        workers = tables.all_workers(file.cursor)
        mine = next((worker.name for worker in workers if worker.id == self.me), None)
        if mine is None:
            raise ConnectionLost(f"another worker took this one for dead and gave its messages back ({self._path})")
        self.is_alone = len(workers) == 1
        dead = [worker for worker in workers if worker.id != self.me and self._is_dead(worker)]
        for worker in dead:
            count = file.transaction(partial(tables.remove_worker, file.cursor, worker.id))
            file.folder.unlink(worker.bell)
            level = logging.WARNING if count else logging.INFO
            logger.log(level, "worker %s (pid %s) has died; %s messages are given back", worker.name, worker.pid, count)
        namesakes = {each.id for each in workers if each.name == mine and each.id != self.me and each not in dead}
        if namesakes - self._namesakes:
            logger.warning(NAMESAKE, mine)
        self._namesakes = namesakes
        strays = tables.strays(file.cursor)
        for owner in strays:
            file.transaction(partial(tables.give_back_all, file.cursor, owner))
        if dead or strays:
            file.folder.ring_workers(besides=self.bell)
        return bool(dead or strays)

    def _is_dead(self, worker: WorkerInfo) -> bool:
        alive = self._file.folder.is_alive(worker.bell)
        if alive is None and worker.id not in self._missing:
            # Somebody may have removed a living worker's bell: it binds it again at its next check.
            self._missing.add(worker.id)
            return False
        if alive is not None:
            self._missing.discard(worker.id)
        return not alive
