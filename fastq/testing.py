"""For users' tests: a real worker beside the test, in the same process. Nothing is forked unless it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

# The life is imported here, though the worker would do so when it starts: a test waits for the imports once.
import fastq.worker.life  # noqa: F401
from fastq.app import FastQ
from fastq.errors import FastqError
from fastq.sending.options import check_names
from fastq.worker.options import WorkerOptions
from fastq.worker.program import FastQProgram, Program
from fastq.worker.worker import Worker

if TYPE_CHECKING:
    import celery

#: What a worker of a test can do without: each costs time at its start, or tells others of it.
_ALONE = {"without_mingle": True, "without_heartbeat": True}


@contextmanager
def worker(
    app: FastQ | celery.Celery, *, concurrency: int = 1, timeout_s: float = 30.0, pool: str = "solo", **options: Any
) -> Iterator[Worker]:
    """Run a worker for ``app`` while the ``with`` block runs; its event loop has a thread of its own.

    ``options`` are those of WorkerOptions. With a ``memory://`` broker this is the way to have a worker at all.

    The pool is ``solo``: calls run one at a time, in another thread of this process, and see what the test has patched.
    A time limit, or the end of the block, interrupts a call between two steps of its code, not in the midst of a wait.
    ``pool="prefork"`` forks real children, ``concurrency`` of them: start it before the test starts threads.

    Raises FastqError when the worker is not ready in time, or a call does not end so long after the block.
    """
    check_names(options, (*(option.name for option in fields(WorkerOptions)), "timeout_s"), "worker()")
    given = WorkerOptions(concurrency=concurrency, pool=pool, **{**_ALONE, **options})
    with _program(app) as program:
        given, _ = program.adopt(given, ())
        program.load(given, ())
        given = program.complete(given)
        program.begin(given.resolved(program.settings))
        with _running(Worker(program, program.prepare(given.resolved(program.settings))), timeout_s) as running:
            yield running


@contextmanager
def _program(app: Any) -> Iterator[Program]:
    if isinstance(app, FastQ):
        yield FastQProgram(app)
    else:
        from fastq.celery.testing import program_of

        with program_of(app) as program:
            yield program


@contextmanager
def _running(running: Worker, timeout_s: float) -> Iterator[Worker]:
    prepared = running.prepare_pool(owns_process=False)
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
    if thread.is_alive():
        raise FastqError(f"a call has not ended {timeout_s} s after the worker's end was asked for")
