"""For users' tests: a real worker beside the test, in the same process. Real children are forked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastq.app import FastQ
from fastq.errors import FastqError
from fastq.worker.options import WorkerOptions
from fastq.worker.program import FastQProgram
from fastq.worker.worker import Worker


@contextmanager
def worker(app: FastQ, *, concurrency: int = 1, timeout_s: float = 30.0, **options: Any) -> Iterator[Worker]:
    """Run a worker for ``app`` while the ``with`` block runs; its event loop has a thread of its own.

    ``options`` are those of WorkerOptions. Start it before the test starts threads: the children are forked here. With
    a ``memory://`` broker this is the way to have a worker at all. Raises FastqError when it is not ready in time.
    """
    app.finalize()
    running = Worker(FastQProgram(app), WorkerOptions(concurrency=concurrency, **options).resolved(app.conf))
    prepared = running.prepare_pool()
    ready = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            running.run_with(prepared, on_ready=ready.set, handle_signals=False)
        except BaseException as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=run, name="fastq-worker", daemon=True)
    thread.start()
    if not ready.wait(timeout_s):
        running.stop_soon()
        raise FastqError(f"the worker was not ready within {timeout_s} s")
    try:
        if failed:
            raise failed[0]
        yield running
    finally:
        running.stop_soon()
        thread.join(timeout_s)
    if failed:
        raise failed[0]
