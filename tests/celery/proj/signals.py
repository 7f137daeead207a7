"""Receivers for every signal that Celery has; each notes the signal, its process, its sender and its arguments."""

from __future__ import annotations

from typing import Any

from celery import signals
from celery.utils.dispatch import Signal

from tests.celery.proj.journal import note

NAMES = sorted(name for name, value in vars(signals).items() if isinstance(value, Signal))
# A receiver of this one turns Celery's own logging off.
LEFT_ALONE = {"setup_logging"}

_kept: list[Any] = []  # receivers are held weakly


def connect_all() -> None:
    """Connect a receiver to each signal."""
    for name in NAMES:
        if name not in LEFT_ALONE:
            _connect(name)


def _connect(name: str) -> None:
    def receive(sender: Any = None, signal: Any = None, **arguments: Any) -> None:
        note(
            "signal",
            name=name,
            sender=describe(sender),
            arguments=sorted(arguments),
            id=task_id(arguments),
            state=arguments.get("state"),
        )

    _kept.append(receive)
    getattr(signals, name).connect(receive)


def describe(sender: Any) -> str:
    """Return what kind of thing sent the signal."""
    if sender is None or isinstance(sender, str):
        return repr(sender) if sender is None else f"str:{sender.partition('@')[0]}"
    name = getattr(sender, "name", None)
    return f"task:{name}" if isinstance(name, str) and hasattr(sender, "apply_async") else type(sender).__name__


def task_id(arguments: dict[str, Any]) -> str | None:
    """Return the id of the call that a signal is about."""
    request = arguments.get("request")
    headers = arguments.get("headers") or {}
    found = arguments.get("task_id") or getattr(request, "id", None) or arguments.get("id") or headers.get("id")
    return str(found) if found else None
