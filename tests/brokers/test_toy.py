"""The broker of ``toys.toy_broker``, one file over ``brokers.turns``: the suites, and a worker that runs its tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastq import FastQ
from fastq.settings import Settings
from tests.support.conformance.consumers import ConsumerConformance
from tests.support.conformance.publishers import PublisherConformance
from tests.support.worker_process import WorkerProcess


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"tests.toys.toy_broker:BROKER://{tmp_path}"


@pytest.fixture
def settings() -> Settings:
    return Settings()


class TestPublisher(PublisherConformance):
    pass


class TestConsumer(ConsumerConformance):
    pass


@pytest.fixture
def app(tmp_path: Path, url: str) -> Iterator[FastQ]:
    """The application that ``worker`` runs, as a sender has it. Messages and results lie in different places."""
    (tmp_path / "messages").mkdir()
    app = FastQ("tasks", broker=f"{url}/messages", backend=f"sqlite:///{tmp_path}/results.db")
    yield app
    app.close()


@pytest.fixture
def worker(tmp_path: Path, app: FastQ) -> Iterator[WorkerProcess]:
    source = f"""
from fastq import FastQ
app = FastQ("tasks", broker={app.conf.broker_url!r}, backend={app.conf.result_backend!r})

@app.task
def double(n):
    return 2 * n

@app.task(bind=True, max_retries=1, default_retry_delay=0.1)
def again(self, n):
    if self.request.retries == 0:
        raise self.retry()
    return double.delay(n).id
"""
    worker = WorkerProcess(tmp_path, "-c", "2", source=source).start()
    yield worker
    worker.kill9()


def test_a_worker_runs_tasks_from_it(app: FastQ, worker: WorkerProcess) -> None:
    doubled = [app.send_task("tasks.double", (n,)) for n in range(20)]
    assert [each.get(10) for each in doubled] == [2 * n for n in range(20)]
    follow_up = app.AsyncResult(app.send_task("tasks.again", (21,)).get(10))
    assert follow_up.get(10) == 42
    assert worker.stop() == 0


def test_a_worker_comes_back_when_it_does(app: FastQ, worker: WorkerProcess, tmp_path: Path) -> None:
    assert app.send_task("tasks.double", (1,)).get(10) == 2
    (tmp_path / "messages").rename(tmp_path / "away")
    worker.wait_for_log("No such file or directory")
    (tmp_path / "away").rename(tmp_path / "messages")
    assert app.send_task("tasks.double", (2,)).get(20) == 4
    assert worker.stop() == 0
