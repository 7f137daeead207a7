"""Fixtures for users' tests: an application without servers, a worker for it in the test's process, and eager calls.

pytest loads this with every run of the user's, so it imports nothing of fastq before a fixture is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import celery

    from fastq.app import FastQ
    from fastq.worker.worker import Worker


@pytest.fixture
def fastq_app() -> Iterator[FastQ | celery.Celery]:
    """Return a new application whose messages and results stay in this process. Override it to test yours."""
    from fastq.app import FastQ
    from fastq.wire.ids import new_id

    place = f"memory://{new_id()}"
    app = FastQ("test", broker=place, backend=place)
    yield app
    app.close()


@pytest.fixture
def fastq_worker_options() -> Mapping[str, Any]:
    """Return the keyword arguments of ``fastq.testing.worker`` for ``fastq_worker``. Override it to give some."""
    return {}


@pytest.fixture
def fastq_worker(fastq_app: FastQ | celery.Celery, fastq_worker_options: Mapping[str, Any]) -> Iterator[Worker]:
    """Run a worker for ``fastq_app`` while the test runs."""
    from fastq.testing import worker

    with worker(fastq_app, **fastq_worker_options) as running:
        yield running


@pytest.fixture
def fastq_eager(fastq_app: FastQ | celery.Celery) -> Iterator[FastQ | celery.Celery]:
    """Have calls of ``fastq_app`` run where they are made while the test runs; return the application."""
    from fastq.app import FastQ

    if isinstance(fastq_app, FastQ):
        with fastq_app.override(task_always_eager=True):
            yield fastq_app
        return
    before = fastq_app.conf.task_always_eager
    fastq_app.conf.task_always_eager = True
    yield fastq_app
    fastq_app.conf.task_always_eager = before
