"""The process that forks children: what its end means for the worker, and what it says of its threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fastq.errors import WorkerLostError
from tests.support.stage import Stage, open_stage, until
from tests.support.worker_process import ROOT, WorkerProcess

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(params=["amqp", "redis", "sqlite"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    opened = open_stage(request.param, request, tmp_path)
    yield opened
    opened.close()


def zygote_of(worker: WorkerProcess) -> int:
    return next(each.pid for each in psutil.Process(worker.pid).children() if each.name() == "fastq-zygote")


def ends_at_once(worker: WorkerProcess) -> None:
    """Kill the zygote; the worker ends with the remedy, and nothing of it stays."""
    worker.tree()
    killed_at = time.monotonic()
    os.kill(zygote_of(worker), signal.SIGKILL)
    assert worker.wait() == 70
    assert time.monotonic() - killed_at < 8
    log = worker.log()
    assert "has ended (signal 9 (SIGKILL)), so the worker ends" in log
    assert "Start the worker again" in log
    assert "Traceback" not in log
    worker.wait_for_no_leftovers(2)


def test_without_it_an_idle_worker_ends_at_once(stage: Stage) -> None:
    worker = stage.start_worker("-c", "2")
    stage.wait_for(stage.send(10), 10)
    ends_at_once(worker)


@pytest.mark.parametrize("mode", ["--reliable", "--compat"])
def test_calls_that_ran_are_given_back_or_failed(stage: Stage, mode: str) -> None:
    worker = stage.start_worker("-c", "1", mode, "--prefetch-multiplier", "4")
    result = stage.call("work", 60)
    stage.ledger.wait_for_starts(1, 10)
    waiting = stage.send(2)
    ends_at_once(worker)
    if mode == "--compat":
        with pytest.raises(WorkerLostError):
            result.get(timeout=10)
    until(lambda: stage.depth() == 2 + (mode == "--reliable"), 5, "messages are in the queue")
    stage.start_worker("-c", "2", mode)
    stage.wait_for(waiting, 20)
    if mode == "--reliable":
        until(lambda: stage.ledger.started()[stage.sent[0]] == 2, 10, "second run")


THREADS = """
import threading, time
from fastq import FastQ

app = FastQ("threads", broker="sqlite:///threads.db")
{start}
"""


@pytest.mark.parametrize("count", [0, 2])
def test_threads_at_the_fork_are_named_once(tmp_path: Path, count: int) -> None:
    start = "threading.Thread(target=time.sleep, args=(600,), daemon=True, name='exporter-%d').start()\n"
    source = THREADS.format(start="".join(start % number for number in range(count)))
    worker = WorkerProcess(tmp_path, "-c", "2", "--pool-start-method", "fork", source=source).start()
    try:
        worker.signal(signal.SIGTTIN)
        until(lambda: len(worker.children()) == 3, 10, "one child more")
        told = [line for line in worker.log().splitlines() if "while it forks" in line]
        assert len(told) == bool(count)
        assert all("has 2 more threads ('exporter-0', 'exporter-1') while it forks" in line for line in told)
        assert all("WARNING" in line for line in told)
    finally:
        worker.kill9()


IN_A_THREAD = """
import os, sys, threading, time
from fastq import FastQ
from fastq.testing import worker

app = FastQ("threads", broker="memory://", backend="memory://")

@app.task
def add(a, b):
    return a + b

running = worker(app, concurrency=1, pool="prefork")
starting = threading.Thread(target=running.__enter__)
starting.start()
starting.join()
assert add.delay(1, 2).get(timeout=20) == 3
print("works", flush=True)
if sys.argv[1:]:
    os.kill(os.getpid(), 9)
running.__exit__(None, None, None)
print("ended", flush=True)
"""


def test_it_does_not_end_with_the_thread_that_forked_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IN_A_THREAD]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("works\nended\n", 0), done.stderr


def test_it_ends_with_the_process_if_a_thread_has_forked_it(tmp_path: Path) -> None:
    # Its children have the output's pipe, so that this returns when all have ended.
    command = [sys.executable, "-c", IN_A_THREAD, "dies"]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("works\n", -signal.SIGKILL), done.stderr


HANGING = """
import os, time
from fastq import FastQ

app = FastQ("hanging", broker="sqlite:///hanging.db")
main, forks = os.getpid(), []

def hang():
    forks.append(1)
    if len(forks) > 1 and os.path.exists("hang"):
        open("hangs", "w").close()
        time.sleep(600)

os.register_at_fork(after_in_child=hang)
"""


def test_a_child_that_hangs_at_its_fork_does_not_hide_its_end(tmp_path: Path) -> None:
    worker = WorkerProcess(tmp_path, "-c", "1", source=HANGING).start()
    try:
        (tmp_path / "hang").touch()
        worker.signal(signal.SIGTTIN)  # one child more
        until((tmp_path / "hangs").exists, 10, "a child hangs")
        ends_at_once(worker)
    finally:
        worker.kill9()


HANGING_AT_BIRTH = """
import os, time
from fastq import FastQ

app = FastQ("hanging", broker="sqlite:///hanging.db")

def hang_for_long():
    time.sleep(600)

os.register_at_fork({where}=hang_for_long)
"""


@pytest.mark.parametrize("where", ["before", "after_in_parent", "after_in_child"])
def test_a_hook_that_hangs_at_its_birth_ends_the_start_and_is_named(tmp_path: Path, where: str) -> None:
    source = HANGING_AT_BIRTH.format(where=where)
    options = ("-c", "1", "--pool-start-method", "fork")
    worker = WorkerProcess(tmp_path, *options, source=source, await_ready=False).start()
    try:
        assert worker.wait(60) == 70
        log = worker.log()
        assert "a hook of os.register_at_fork" in log
        assert "in hang_for_long time.sleep(600) [exit 70: " in log.split("Its stack:")[1]
        assert "--pool-start-method spawn" in log
    finally:
        worker.kill9()
