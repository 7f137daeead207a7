"""Children of a Celery application that die or hang in worker_process_init, and pools that change their size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.celery.conftest import OpenStage
from tests.celery.stage import CeleryStage
from tests.support.servers import wait_until
from tests.support.worker_process import WorkerProcess

SOURCE = """
import os, time
from celery import Celery
from celery.signals import worker_process_init

app = Celery("tasks", broker={url!r}, backend={url!r})
app.conf.broker_connection_retry_on_startup = True
app.conf.update({settings!r})

@worker_process_init.connect
def begin(**_):
    file = os.open({count!r}, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.write(file, b".")
    n = os.lseek(file, 0, os.SEEK_CUR)
    if n in {hangs!r}:
        time.sleep(60)
    if n in {dies!r}:
        os._exit(3)

@app.task(name="pid")
def pid():
    return os.getpid()
"""

pytestmark = pytest.mark.redis


@pytest.fixture
def stage(open_stage: OpenStage) -> CeleryStage:
    return open_stage("fastq", "redis", "redis")


def test_children_that_hang_or_die_in_their_init_handler_cost_nothing_but_a_start(
    stage: CeleryStage, tmp_path: Path, start_worker: Callable[..., WorkerProcess]
) -> None:
    settings = {"worker_proc_alive_timeout": 2.0}
    source = SOURCE.format(
        url=stage.broker_url, count=str(tmp_path / "n"), hangs=(1,), dies=(4, 6, 7), settings=settings
    )
    options = ("-c", "2", "--max-tasks-per-child", "1", "--without-gossip", "--without-mingle")
    worker = start_worker(*options, source=source)
    pids = [stage.client.send_task("pid").get(timeout=20) for _ in range(8)]
    assert len(set(pids)) == 8
    worker.wait_for_log(r"pid:\d+ is not ready after [\d.]+ s: what it does \(handlers of worker_process_init")
    worker.wait_for_log(r"pid:\d+ was not ready after [\d.]+ s \(fastq_child_start_timeout\) and is killed")
    worker.wait_for_log("exited with 'exitcode 3' before it was ready; another one is started in", count=3)
    assert "in begin" in worker.log()  # the stack of the one that hangs
    assert worker.stop() == 0


def test_growing_and_shrinking_by_remote_control_at_once_leaves_no_child_over(
    stage: CeleryStage, tmp_path: Path, start_worker: Callable[..., WorkerProcess]
) -> None:
    # Celery's own worker is left with 15 children too many.
    source = SOURCE.format(url=stage.broker_url, count=str(tmp_path / "n"), hangs=(), dies=(), settings={})
    worker = start_worker("-c", "2", "--without-gossip", "--without-mingle", source=source)
    for _ in range(5):
        stage.client.control.pool_grow(5)
        stage.client.control.pool_shrink(5)
    stage.client.control.pool_grow(1, reply=True, timeout=5, limit=1)
    wait_until(lambda: len(worker.children()) == 3, 20, lambda: AssertionError(f"children: {worker.children()}"))
    assert stage.client.send_task("pid").get(timeout=20) in worker.children()
    assert worker.stop() == 0
