"""Celery's names of pools, in the words of fastq's own ``-P``."""

from __future__ import annotations

import os
from typing import Any, Final

from celery.concurrency import ALIASES

from fastq.errors import SettingsError
from fastq.pool import POOL_NAMES

#: Where Celery looks for the pool that its users call ``custom``.
CUSTOM: Final = "CELERY_CUSTOM_WORKER_POOL"

_OURS: Final = set(POOL_NAMES) - {"processes"}
_NAMES: Final[dict[str, str]] = {place: name for name, place in ALIASES.items() if name in _OURS}


def pool_name(pool: Any) -> str:
    """Return the pool that an option, a setting or a class stands for: a name or ``module:Class``; "" for neither.

    Raises SettingsError for ``custom`` where the environment does not say which.
    """
    if isinstance(pool, type):
        pool = f"{pool.__module__}:{pool.__qualname__}"
    named = pool if isinstance(pool, str) else ""
    if named in POOL_NAMES:
        return named
    if named == "custom":
        named = os.environ.get(CUSTOM, "")
        if not named:
            raise SettingsError(f"the pool is to be custom, and {CUSTOM} names none: set it to package:class")
    if ":" not in named:
        module, _, name = named.rpartition(".")
        named = f"{module}:{name}" if module else ""
    return _NAMES.get(named, named)
