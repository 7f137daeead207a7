"""Assembling and running a worker. Only what is asked for is imported: most commands need no event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastq.worker.options import WorkerOptions
    from fastq.worker.worker import Worker

__all__ = ["Worker", "WorkerOptions"]


def __getattr__(name: str) -> Any:
    if name == "Worker":
        from fastq.worker.worker import Worker

        return Worker
    if name == "WorkerOptions":
        from fastq.worker.options import WorkerOptions

        return WorkerOptions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
