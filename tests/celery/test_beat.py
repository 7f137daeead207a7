"""`worker -B`: the application's own scheduler beside the worker, in a process that is kept alive and ends with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import psutil
import pytest

from tests.support.servers import Redis
from tests.support.worker_process import Program, WorkerProcess

pytestmark = pytest.mark.redis

SOURCE = """
import os
from celery import Celery, signals
from celery.beat import PersistentScheduler

app = Celery("tasks", broker="{url}")
app.conf.broker_connection_retry_on_startup = True
app.conf.beat_schedule = {{"often": {{"task": "told", "schedule": 0.2}}}}

class Own(PersistentScheduler):
    def apply_entry(self, entry, **options):
        print(f"applies {{entry.name}} {{self.schedule_filename}}")
        super().apply_entry(entry, **options)

    def close(self):
        super().close()
        print("kept")

@signals.beat_init.connect
def begun(sender, **_):
    print(f"beat {{os.getpid()}} {{type(sender.scheduler).__name__}}")

@signals.beat_embedded_init.connect
def embedded(**_):
    print(f"embedded {{os.getpid()}}")

@app.task(name="told")
def told():
    print("told")
"""
ALONE = ("-c", "1", "--without-gossip", "--without-mingle", "-B", "-s", "times", "--scheduler", "tasks:Own")


@pytest.mark.parametrize("program", ["celery", "fastq"], ids=["under_celery", "under_fastq"])
def test_the_scheduler_runs_beside_the_worker_and_ends_with_it(
    redis_server: Redis, start_worker: Callable[..., WorkerProcess], program: Program
) -> None:
    source = SOURCE.format(url=redis_server.url(7))
    worker = start_worker(*ALONE, source=source, program=program)
    pid = int(worker.wait_for_log(r"beat (\d+) Own")[1])
    worker.wait_for_log(f"embedded {pid}\n")
    worker.wait_for_log("applies often times")
    worker.wait_for_log("Task told.* succeeded")
    if program == "fastq":
        os.kill(pid, signal.SIGKILL)
        worker.wait_for_log(r"beat has ended \(signal 9 \(SIGKILL\)\); it starts again in 1 s")
        worker.wait_for_log(r"beat (\d+) Own", count=2)
    assert worker.stop() == 0
    worker.wait_for_no_leftovers()
    if program == "fastq":
        assert "Beat] kept" in worker.log()


def test_a_worker_does_not_go_on_without_its_beat(
    redis_server: Redis, start_worker: Callable[..., WorkerProcess]
) -> None:
    worker = start_worker(*ALONE, source=SOURCE.format(url=redis_server.url(7)))
    pid = int(worker.wait_for_log(r"beat (\d+) Own")[1])
    between = psutil.Process(pid).parent()
    assert between is not None
    between.kill()
    # What forks the beat forks all children: without it the worker says so and ends.
    assert worker.wait(20) == 70
    assert "has ended (signal 9 (SIGKILL)), so the worker ends" in worker.log()
    worker.wait_for_no_leftovers()


def test_the_beat_of_a_worker_that_is_killed_keeps_its_schedule_and_ends(
    redis_server: Redis, start_worker: Callable[..., WorkerProcess]
) -> None:
    worker = start_worker(*ALONE, source=SOURCE.format(url=redis_server.url(7)))
    worker.wait_for_log("applies often")
    worker.kill9_parent()
    worker.wait_for_no_leftovers()
    assert "Beat] kept" in worker.log()
