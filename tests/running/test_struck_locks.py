"""What an exception from outside leaves held, where it strikes just after a lock was taken: other threads go on."""

from __future__ import annotations

import _imp
import importlib
import logging
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import _bootstrap
from types import SimpleNamespace
from typing import Any

import pytest

from fastq.errors import SoftTimeLimitExceeded
from fastq.pool.outside import release_locks, watched_locks
from fastq.running.limit import SoftLimit
from fastq.running.loop import LoopLimit
from fastq.running.strikes import Strikes
from fastq.wire.call import Call

handler = logging.StreamHandler()


def take_import_lock() -> None:
    _imp.acquire_lock()


def take_module_lock() -> None:
    _bootstrap._get_module_lock("a_module_that_waits").acquire()


def take_logging_lock() -> None:
    logging._lock.acquire()  # type: ignore[attr-defined]


def take_handler_lock() -> None:
    handler.acquire()


watched = threading.RLock()
watched_locks.add(watched)


def take_watched_lock() -> None:
    watched.acquire()


@pytest.fixture(
    params=[take_import_lock, take_module_lock, take_logging_lock, take_handler_lock, take_watched_lock],
    ids=lambda each: each.__name__,
)
def take(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    kept = _bootstrap._get_module_lock("a_module_that_waits")
    yield request.param
    del kept


def others_go_on() -> bool:
    """Whether another thread can import, log, and make a logger."""

    def use() -> None:
        waited_for = _bootstrap._get_module_lock("a_module_that_waits")
        waited_for.acquire()
        waited_for.release()
        sys.modules.pop("this_is_not_there", None)
        with pytest.raises(ImportError):
            importlib.import_module("this_is_not_there")
        logging.getLogger("fastq.tests.struck").setLevel(logging.INFO)
        handler.acquire()
        handler.release()
        watched.acquire()
        watched.release()

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(5)
    return not thread.is_alive()


def in_one_step(*functions: Callable[[], object]) -> None:
    """Call functions of C so that nothing comes between them."""
    list(map(partial.__call__, map(partial, functions)))


@pytest.mark.parametrize(
    "take",
    [_imp.acquire_lock, logging._lock.acquire, handler.lock.acquire],  # type: ignore[attr-defined,union-attr]
    ids=["import", "logging", "handler"],
)
def test_in_a_thread(take: Any) -> None:
    strikes, ends = Strikes(), []
    call = Call.__new__(Call)

    def task() -> None:
        in_one_step(partial(strikes.strike, call.seq, SoftTimeLimitExceeded), take)
        while True:
            pass

    def run(call: Any) -> None:
        try:
            strikes.guard(call, task, (), {})
        except SoftTimeLimitExceeded as error:
            ends.append(error)

    def work() -> None:
        strikes.expect(call)
        strikes.run(call, run)
        release.wait(10)

    release = threading.Event()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while not ends:
            thread.join(0.01)
        assert others_go_on()
    finally:
        release.set()
        thread.join(10)


def test_handlers_may_have_locks_of_another_kind() -> None:
    other = logging.StreamHandler()
    other.lock = multiprocessing.RLock()  # type: ignore[assignment]
    half_made = logging.StreamHandler()
    del half_made.lock
    release_locks()
    half_made.createLock()


def test_a_call_that_a_loop_runs_in_a_thread_is_cancelled_too() -> None:
    limit = LoopLimit(lambda call: SoftTimeLimitExceeded())
    call = Call.__new__(Call)
    limit.strikes.expect(call)
    limit.cancel(call.seq)
    with pytest.raises(SystemExit):
        limit.strikes.guard(call, lambda: None, (), {})


def test_by_a_signal(take: Callable[[], None]) -> None:

    limit = SoftLimit(lambda call: SoftTimeLimitExceeded())
    limit.begin()
    call: Any = SimpleNamespace(soft_time_limit=0.05, started_s=time.monotonic())

    def task() -> None:
        take()
        while True:
            pass

    with pytest.raises(SoftTimeLimitExceeded):
        limit.run(call, task, (), {})
    assert others_go_on()
