"""The log file as a handler. Where records go and how they look is decided in ``fastq.worker.log``."""

from __future__ import annotations

import io
import logging.handlers
import os


class LogFile(logging.handlers.WatchedFileHandler):
    """A log file of mode 0640 that follows its name after a rotation."""

    def _open(self) -> io.TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        return open(descriptor, "a", encoding=self.encoding, errors="backslashreplace")
