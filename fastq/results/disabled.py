"""No result store: asking it for a result is an error that says how to get one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from fastq.errors import ResultsDisabled

if TYPE_CHECKING:
    from fastq.interfaces import Meta
    from fastq.settings import Settings


class DisabledStore:
    """ResultStore for ``disabled`` (the protocol is ``interfaces.ResultStore``)."""

    def __init__(self, url: str = "disabled", settings: Settings | None = None) -> None:
        pass

    def reply_address(self, deadline: float | None = None) -> None:
        """Return None: nobody is to reply."""

    def is_there(self) -> bool:
        """Return True: all that is asked is refused at once."""
        return True

    def load(self, task_id: str) -> Meta | None:
        """Raise ResultsDisabled."""
        _refuse(task_id)

    def wait(self, task_id: str, timeout_s: float | None) -> Meta:
        """Raise ResultsDisabled."""
        _refuse(task_id)

    def watch(self, task_id: str, callback: Callable[[Meta], None]) -> NoReturn:
        """Raise ResultsDisabled."""
        _refuse(task_id)

    def observe(self, task_id: str, callback: Callable[[Meta], None]) -> NoReturn:
        """Raise ResultsDisabled."""
        _refuse(task_id)

    def save(self, task_id: str, state: str, meta: bytes) -> None:
        """Raise ResultsDisabled."""
        _refuse(task_id)

    def forget(self, task_id: str) -> None:
        """Raise ResultsDisabled."""
        _refuse(task_id)

    def close(self) -> None:
        """Do nothing."""


def _refuse(task_id: str) -> NoReturn:
    raise ResultsDisabled(
        f"task {task_id} has no result: this application stores none. "
        "Name a store, FastQ(backend='rpc://') with RabbitMQ or FastQ(backend='sqlite:///fastq.db')"
    )
