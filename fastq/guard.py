"""Methods that the message loop calls: what goes wrong in one is logged, and stops neither loop nor worker."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger("fastq.worker")

C = TypeVar("C", bound=type)


def guarded(seam: type, **defaults: Any) -> Callable[[C], C]:
    """Return a decorator for a class that implements ``seam``, a protocol: it guards the seam's methods defined there.

    ``defaults`` are what a method returns when it has failed, by its name; otherwise that is None.
    """

    def decorate(cls: C) -> C:
        for name in vars(seam):
            if not name.startswith("_") and name in vars(cls):
                setattr(cls, name, _guard(vars(cls)[name], defaults.get(name)))
        return cls

    return decorate


def _guard(method: Callable[..., Any], default: Any) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any) -> Any:
        try:
            return method(*args)
        except Exception:
            logger.exception("internal error in %s, please report it", method.__name__)
            return default

    return call
