"""The log file as a handler. Where records go and how they look is decided in ``log``."""

from __future__ import annotations

import io
import logging.handlers
import os

from fastq.worker.process.files import open_file


class LogFile(logging.handlers.WatchedFileHandler):
    """A log file of mode 0640 that follows its name after a rotation, if that can be opened."""

    def _open(self) -> io.TextIOWrapper:
        descriptor = open_file(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        return open(descriptor, "a", encoding=self.encoding, errors="backslashreplace")

    def reopenIfNeeded(self) -> None:  # noqa: N802  the base class's name
        """Open the file again if another one has its name now; if that fails, go on with the one that had it."""
        try:
            found = os.stat(self.baseFilename)
            if (found.st_dev, found.st_ino) == (self.dev, self.ino):
                return
        except OSError:
            pass  # moved away: it is made anew
        try:
            fresh = self._open()
        except OSError:
            return
        if self.stream is not None:
            self.stream.close()
        self.stream = fresh
        self._statstream()
