"""Task states and what follows from them. Source: Celery's state names, which are part of the wire format."""

from __future__ import annotations

from typing import Final

PENDING: Final = "PENDING"
RECEIVED: Final = "RECEIVED"
STARTED: Final = "STARTED"
SUCCESS: Final = "SUCCESS"
FAILURE: Final = "FAILURE"
REVOKED: Final = "REVOKED"
REJECTED: Final = "REJECTED"
RETRY: Final = "RETRY"
IGNORED: Final = "IGNORED"

#: The task has ended: its result will not change any more.
READY_STATES: Final = frozenset({SUCCESS, FAILURE, REVOKED})
#: The stored result is an exception that ``get()`` raises.
PROPAGATE_STATES: Final = frozenset({FAILURE, REVOKED})
#: The stored result is an exception.
EXCEPTION_STATES: Final = frozenset({RETRY, FAILURE, REVOKED})
