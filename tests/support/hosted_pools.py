"""Pools as projects write them for Celery: one that hands calls to threads, one that runs them at once, odd ones."""

from __future__ import annotations

from typing import Any

from celery.concurrency import gevent, prefork, thread
from celery.concurrency.base import BasePool, apply_target


class Threads(thread.TaskPool):
    """Celery's threads, with something added."""

    def on_apply(self, target: Any, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Print which call it was given."""
        print(f"applies {args[0]} {args[1]}", flush=True)
        return super().on_apply(target, args, kwargs, **options)


class AtOnce(BasePool):
    """Each call runs before it has been handed over, as in Celery's solo pool."""

    body_can_be_buffer = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_apply = apply_target
        self.limit = 1


class Unwilling(BasePool):
    """It cannot take calls."""

    def on_apply(self, *args: Any, **options: Any) -> Any:
        """Fail."""
        raise RuntimeError("no more calls")


class Drops(BasePool):
    """It gives calls up before they have begun."""

    def on_apply(self, target: Any, error_callback: Any, **options: Any) -> None:
        """Say so, as Celery's pools do."""
        error_callback("no room", 0.0)

    def apply_async(self, target: Any, **options: Any) -> None:  # type: ignore[override]
        """Hand it on."""
        self.on_apply(target, **options)


class StopsLate(Threads):
    """Its stop never returns."""

    def on_stop(self) -> None:
        """Wait for ever."""
        import threading

        threading.Event().wait()


class Processes(prefork.TaskPool):
    """It forks children of its own."""


class Greenlets(gevent.TaskPool):
    """It wants a patched process."""
