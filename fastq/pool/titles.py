"""What ``ps`` shows of the worker's processes where the library setproctitle is installed; without it, nothing.

In Celery's form, as people's scripts look for it: ``[celeryd: celery@host:ForkPoolWorker-1]``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final

from fastq.net.urls import mask_one

#: Celery's variable that turns titles off.
_OFF: Final = "NOSETPS"

# Both are looked for once, before the first fork.
_set: Callable[[str], None] | None = None
if _OFF not in os.environ:
    with contextlib.suppress(ImportError):
        from setproctitle import setproctitle as _set


def set_title(program: str, hostname: str, process: str, info: str = "") -> None:
    """Show this process as one of the node's: ``program`` is the first word, ``process`` the name that records bear."""
    if _set is not None:
        _set(f"[{program}: {hostname}:{process}]{f' {info}' if info else ''}")


def process_name(number: int, calls: str = "one") -> str:
    """Return the name of the child of that number, 1 or more, among those that run calls that way: Celery's, mostly."""
    return f"{'AsyncPoolWorker' if calls == 'loop' else 'ForkPoolWorker'}-{number}"


def active(words: Sequence[str] = ()) -> str:
    """Return what the main process's title says of a worker that takes tasks."""
    return f"-active- ({' '.join(map(mask_one, words or sys.argv[1:]))})"
