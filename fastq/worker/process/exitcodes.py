"""Exit codes of the command line and what they mean. No behaviour beyond the mapping from errors.

Source: BSD ``sysexits.h`` for the names and numbers from 64 up; click for 2; Celery for which of them a worker uses.
"""

from __future__ import annotations

from typing import Final

from fastq.errors import ConnectionLost, LocalProtocolError, PoolLost, PublishError, ResultTimeout, SettingsError

EX_OK: Final = 0
EX_FAILURE: Final = 1  # also a cold stop
EX_USAGE: Final = 2
EX_UNAVAILABLE: Final = 69
EX_SOFTWARE: Final = 70
EX_CANTCREAT: Final = 73
EX_TEMPFAIL: Final = 75
EX_CONFIG: Final = 78

#: The codes in words, printed beside the number.
MEANINGS: Final = {
    EX_OK: "clean stop",
    EX_FAILURE: "failed",
    EX_USAGE: "wrong usage",
    EX_UNAVAILABLE: "no worker answered",
    EX_SOFTWARE: "internal error",
    EX_CANTCREAT: "cannot create a file",
    EX_TEMPFAIL: "temporary failure, try again",
    EX_CONFIG: "bad configuration",
}


class CannotCreate(SettingsError):
    """A pid file or log file cannot be created; the text names the file and the remedy."""


# The first match counts, so a class stands before its bases.
_CODES: Final[tuple[tuple[type[BaseException], int], ...]] = (
    (CannotCreate, EX_CANTCREAT),
    (SettingsError, EX_CONFIG),
    (ConnectionLost, EX_TEMPFAIL),
    (PublishError, EX_TEMPFAIL),
    (ResultTimeout, EX_TEMPFAIL),
    (LocalProtocolError, EX_SOFTWARE),
    (PoolLost, EX_SOFTWARE),
)


def exit_code_of(error: BaseException) -> int:
    """Return the exit code that an error ends the process with."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), EX_FAILURE)
