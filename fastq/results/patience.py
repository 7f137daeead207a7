"""How long a store that is away is waited for: told of each success and failure, it says when to try again."""

from __future__ import annotations

import time
from typing import Final

from fastq.errors import ConnectionLost, FastqError

FIRST_PAUSE_S: Final = 0.05
LAST_PAUSE_S: Final = 1.0


class Patience:
    """None with a place that was never there, nor with errors that another attempt would not mend."""

    def __init__(self, patience_s: float) -> None:
        self.was_there = False
        #: Why the last attempt failed.
        self.failure: FastqError | None = None
        self._patience_s = patience_s
        self._failing_since = 0.0
        self._pause_s = FIRST_PAUSE_S

    def renew(self) -> None:
        """An attempt has succeeded."""
        self.was_there = True
        self._failing_since, self._pause_s = 0.0, FIRST_PAUSE_S

    def endure(self, error: FastqError) -> float:
        """An attempt has failed: return when (monotonic) to try again; raise the error where that is hopeless."""
        now = time.monotonic()
        self.failure = error
        self._failing_since = self._failing_since or now
        patience_s = self._patience_s if self.was_there and isinstance(error, ConnectionLost) else 0.0
        if now - self._failing_since >= patience_s:
            raise error
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LAST_PAUSE_S)
        return now + pause_s
