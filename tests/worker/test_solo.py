"""A worker that runs calls in its own process: limits, stops, signals, a debugger; and nothing is lost."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastq import AsyncResult, FastQ, TaskRevoked, TimeLimitExceeded
from tests.support.servers import Redis, wait_until
from tests.support.stage import Stage, empty_database, open_stage
from tests.support.worker_process import WorkerProcess

SOURCE = """
import asyncio, contextlib, multiprocessing, os, signal, sys, threading, time

from fastq import FastQ
from fastq.errors import SoftTimeLimitExceeded

app = FastQ("tasks", broker="sqlite:///q.db", backend="sqlite:///q.db")


def begin(gate):
    open(gate, "w").close()


@app.task
def where():
    return os.getpid(), threading.current_thread() is threading.main_thread(), multiprocessing.current_process().name


@app.task
def wait(gate, seconds):
    begin(gate)
    try:
        time.sleep(seconds)
    finally:
        begin(gate + ".left")


@app.task
def swallow(gate, seconds):
    begin(gate)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            time.sleep(0.05)
        except BaseException:
            pass


@app.task
def softly(seconds):
    try:
        time.sleep(seconds)
    except SoftTimeLimitExceeded:
        return "stopped in time"


@app.task
def leave():
    sys.exit(3)


@app.task
def strike_from_another_thread():
    def strike():
        time.sleep(0.5)  # the call has ended by then
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    threading.Thread(target=strike, daemon=True).start()


@app.task
async def leave_something_running():
    async def go_on():
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1)

    app.left = asyncio.create_task(go_on())


@app.task(time_limit=1)
async def wait_in_a_thread():
    await asyncio.to_thread(time.sleep, 6)


@app.task
def fork_and_terminate():
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(writer, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@app.task
def send_on():
    return where.delay().id


@app.task
def debug(n):
    answer = n * 2
    breakpoint()
    return answer
"""


class Solo:
    """A worker and a client of its application."""

    def __init__(self, start: Callable[..., WorkerProcess], *arguments: str, **options: Any) -> None:
        self.worker = start("-P", "solo", *arguments, source=SOURCE, **options)
        self.folder = self.worker.folder
        url = f"sqlite:///{self.folder}/q.db"
        self.app = FastQ("tasks", broker=url, backend=url)

    def send(self, task: str, *args: Any, **options: Any) -> AsyncResult[Any]:
        return self.app.send_task(f"tasks.{task}", args, **options)

    def get(self, task: str, *args: Any) -> Any:
        return self.send(task, *args).get(timeout=20)

    def running(self, task: str, *args: Any) -> AsyncResult[Any]:
        """Return a call of ``wait`` or ``swallow`` that has begun."""
        sent = self.send(task, "begun", *args)
        wait_until((self.folder / "begun").exists, 20, lambda: TimeoutError(self.worker.log()))
        return sent

    @property
    def has_left(self) -> bool:
        return (self.folder / "begun.left").exists()


@pytest.fixture
def solo(start_worker: Callable[..., WorkerProcess]) -> Iterator[Callable[..., Solo]]:
    made: list[Solo] = []

    def make(*arguments: str, **options: Any) -> Solo:
        made.append(Solo(start_worker, *arguments, **options))
        return made[-1]

    yield make
    for each in made:
        each.app.close()


def test_calls_run_in_the_main_thread_of_the_worker_and_nothing_is_forked(solo: Callable[..., Solo]) -> None:
    at = solo("-c", "4")
    assert at.get("where") == [at.worker.pid, True, "MainProcess"]
    assert psutil.Process(at.worker.pid).children() == []
    assert "concurrency: 1 (solo)" in at.worker.log()
    assert at.worker.stop() == 0


def test_what_a_call_sends_is_sent(solo: Callable[..., Solo]) -> None:
    at = solo()
    assert at.app.AsyncResult(at.get("send_on")).get(timeout=20)[0] == at.worker.pid


def test_options_of_children_are_ignored_and_named(solo: Callable[..., Solo]) -> None:
    at = solo("--max-tasks-per-child", "1", "--max-memory-per-child", "1")
    assert at.get("where")[0] == at.get("where")[0]
    at.worker.wait_for_log("--max-tasks-per-child has no effect with -P solo")
    at.worker.wait_for_log("--max-memory-per-child has no effect with -P solo")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_warm_stop_lets_the_call_end(solo: Callable[..., Solo], signum: signal.Signals) -> None:
    at = solo()
    sent = at.running("wait", 1.0)
    at.worker.signal(signum)
    assert at.worker.wait() == 0
    assert at.has_left
    assert sent.get(timeout=5) is None
    assert "Warm shutdown" in at.worker.log()


@pytest.mark.parametrize("signals", [[signal.SIGQUIT], [signal.SIGINT, signal.SIGINT]])
def test_a_cold_stop_interrupts_the_call_and_gives_it_back(
    solo: Callable[..., Solo], signals: list[signal.Signals]
) -> None:
    at = solo()
    sent = at.running("wait", 60)
    began = time.monotonic()
    for signum in signals:
        at.worker.signal(signum)
        at.worker.wait_for_log("shutdown")
    assert at.worker.wait(10) == 1
    assert time.monotonic() - began < 5
    assert at.has_left
    assert sent.state == "PENDING"
    assert at.app.publisher.depth("celery") == 1


def test_a_cold_stop_ends_a_call_that_does_not_give_way(solo: Callable[..., Solo]) -> None:
    at = solo()
    sent = at.running("swallow", 60)
    at.worker.signal(signal.SIGQUIT)
    assert at.worker.wait(10) == 1
    assert sent.state == "PENDING"
    assert at.app.publisher.depth("celery") == 1


def test_a_warm_stop_whose_time_is_over_gives_the_call_back(solo: Callable[..., Solo]) -> None:
    at = solo("--grace", "0.3")
    at.running("wait", 60)
    assert at.worker.stop(10) == 0
    assert at.has_left
    assert at.app.publisher.depth("celery") == 1


def test_the_soft_limit_is_raised_in_the_call(solo: Callable[..., Solo]) -> None:
    at = solo("--soft-time-limit", "0.3")
    assert at.get("softly", 60) == "stopped in time"


def test_the_hard_limit_is_raised_in_the_call_and_the_worker_goes_on(solo: Callable[..., Solo]) -> None:
    at = solo("--time-limit", "0.3")
    sent = at.running("wait", 60)
    with pytest.raises(Exception, match=r"TimeLimitExceeded|0\.3"):
        sent.get(timeout=20)
    assert type(sent.result).__name__ == "TimeLimitExceeded"
    assert at.has_left
    assert at.get("where")[0] == at.worker.pid
    assert at.worker.log().count("Traceback") == 0
    assert at.worker.stop() == 0


def test_a_call_that_ignores_its_hard_limit_ends_the_worker(solo: Callable[..., Solo]) -> None:
    at = solo("--time-limit", "0.3")
    sent = at.running("swallow", 60)
    assert at.worker.wait(20) == 70
    assert type(sent.get(timeout=5, propagate=False)).__name__ == "TimeLimitExceeded"
    assert at.app.publisher.depth("celery") == 0
    assert re.search(
        r"task tasks\.swallow\[\S+\] does not end, and it runs in the worker's own process", at.worker.log()
    )


def test_a_call_that_exits_fails_and_the_worker_goes_on(solo: Callable[..., Solo]) -> None:
    at = solo()
    assert repr(at.send("leave").get(timeout=20, propagate=False)) == "SystemExit(3)"
    assert at.get("where")[0] == at.worker.pid


def test_what_a_call_forks_can_be_terminated(solo: Callable[..., Solo]) -> None:
    at = solo()
    assert at.get("fork_and_terminate") == -signal.SIGTERM
    assert at.get("where")[0] == at.worker.pid


def test_usr1_dumps_the_stacks_in_the_midst_of_a_call(solo: Callable[..., Solo]) -> None:
    at = solo()
    at.running("wait", 2)
    at.worker.signal(signal.SIGUSR1)
    at.worker.wait_for_log(r'tasks\.py", line \d+ in wait')
    assert at.get("where")[0] == at.worker.pid


def test_hup_restarts_after_the_call(solo: Callable[..., Solo]) -> None:
    at = solo()
    sent = at.running("wait", 1)
    at.worker.signal(signal.SIGHUP)
    at.worker.wait_for_log(r"ready\.", 30, count=2)
    assert sent.get(timeout=5) is None
    assert at.get("where")[0] == at.worker.pid
    assert at.worker.stop() == 0


def test_a_signal_that_does_not_wake_the_main_thread_is_heard_all_the_same(solo: Callable[..., Solo]) -> None:
    at = solo()
    at.get("strike_from_another_thread")
    assert at.worker.wait(5) == 0


def test_a_hard_limit_does_not_wait_for_threads_and_tasks_that_a_coroutine_has_left(solo: Callable[..., Solo]) -> None:
    at = solo()
    at.get("leave_something_running")
    assert isinstance(at.send("wait_in_a_thread").get(timeout=20, propagate=False), TimeLimitExceeded)
    assert at.get("where")[0] == at.worker.pid
    assert at.worker.stop(20) == 0  # Python itself waits for the thread


def test_a_debugger_has_the_terminal(solo: Callable[..., Solo], start_worker: Callable[..., WorkerProcess]) -> None:
    ours, theirs = pty.openpty()
    at = solo(stdin=theirs)
    os.close(theirs)
    sent = at.send("debug", 21)
    at.worker.wait_for_log(r"\(Pdb\) ")
    os.write(ours, b"p 'answer is', answer\n")
    at.worker.wait_for_log(r"\('answer is', 42\)")
    os.write(ours, b"answer = 7\nc\n")
    assert sent.get(timeout=10) == 7
    # The debugger has set a handler of its own for Ctrl-C.
    at.worker.signal(signal.SIGTERM)
    assert at.worker.wait() == 0
    os.close(ours)


@pytest.mark.rabbitmq
@pytest.mark.parametrize("kind", ["amqp", "redis", "sqlite"])
def test_a_worker_that_is_killed_in_a_call_loses_nothing(kind: Any, request: Any, tmp_path: Path) -> None:
    stage: Stage = open_stage(kind, request, tmp_path)
    try:
        worker = stage.start_worker("-P", "solo", "--reliable")
        stage.send(20, "work", 0.05)
        stage.ledger.wait_for_done(5, 15)
        worker.kill9_when(lambda: bool(stage.ledger.running()))
        stage.start_worker("-P", "solo", "--reliable")
        stage.wait_for(stage.sent, 40)
        stage.wait_for_settled()
        assert not stage.verdict("kill -9 of a solo worker").lost
    finally:
        stage.close()


@pytest.mark.redis
def test_a_call_that_is_terminated_ends_alone(redis_server: Redis, tmp_path: Path) -> None:
    stage = Stage("redis", empty_database(redis_server), tmp_path)
    try:
        worker = stage.start_worker("-P", "solo")
        sent = stage.call("work", 60)
        wait_until(lambda: stage.ledger.running() != {}, 20, lambda: TimeoutError(worker.log()))
        command = [sys.executable, "-m", "fastq", "-b", stage.url, "control", "terminate", "SIGTERM", sent.id]
        subprocess.run(command, check=True, timeout=60)
        assert isinstance(sent.get(timeout=20, propagate=False), TaskRevoked)
        assert stage.call("work").get(timeout=20) == 1
        assert worker.stop() == 0
        stage.wait_for_settled()
    finally:
        stage.close()
