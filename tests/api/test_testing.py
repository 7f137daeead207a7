"""``fastq.testing.worker``: a worker inside the process of a test, for both kinds of application."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from unittest import mock

import celery
import pytest
from celery import chain
from kombu.transport.memory import Channel

from fastq import FastQ
from fastq.errors import FastqError, PoolLost, SettingsError, SoftTimeLimitExceeded, TimeLimitExceeded
from fastq.testing import worker
from fastq.worker.worker import Worker
from tests.support.fault_proxy import FaultProxy
from tests.support.stage import empty_database

#: How soon a worker is to be ready; of so many one has to be, as the machine may be busy with other tests.
READY_S = 0.1
ROUNDS = 200


@pytest.fixture
def app(request: pytest.FixtureRequest) -> Iterator[FastQ]:
    url = f"memory://{request.node.name}"
    made = FastQ("tested", broker=url, backend=url)
    yield made
    made.close()


@pytest.fixture
def celery_app() -> Iterator[celery.Celery]:
    made = celery.Celery("tested", broker="memory://", backend="cache+memory://", set_as_current=False)
    yield made
    made.close()


def busy(seconds: float) -> None:
    """Take that long, in steps that an exception of another thread comes between."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.01)


def test_an_unknown_option_of_a_worker_is_named_with_the_nearest_one(app: FastQ) -> None:
    for option, nearest in (("timelimit", "time_limit"), ("timeout", "timeout_s"), ("queue", "queues")):
        words = rf"worker\(\) got an unknown option '{option}'; did you mean '{nearest}'\?"
        with pytest.raises(TypeError, match=words), worker(app, **{option: 5}):
            pass


@pytest.mark.rabbitmq
@pytest.mark.redis
@pytest.mark.parametrize("server", ["rabbitmq", "redis_server"])
def test_a_worker_says_once_that_it_is_ready(
    server: str,
    request: pytest.FixtureRequest,
    fault_proxy: Callable[[str, int], FaultProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not again with each connection: what starts with it would start again."""
    told: list[str] = []
    run_with = Worker.run_with

    def run(self: Worker, prepared: Any, on_ready: Callable[[], None], handle_signals: bool) -> int:
        def tell() -> None:
            told.append("ready")
            on_ready()

        return run_with(self, prepared, tell, handle_signals)

    monkeypatch.setattr(Worker, "run_with", run)
    broker = request.getfixturevalue(server)
    url = broker.url(broker.new_vhost()) if server == "rabbitmq" else empty_database(broker)
    proxy = fault_proxy("127.0.0.1", broker.port)
    with closing(FastQ("cut", broker=proxy.url(url), backend="memory://cut")) as app:

        @app.task
        def add(x: int, y: int) -> int:
            return x + y

        with worker(app):
            assert add.delay(1, 2).get(timeout=20) == 3
            for _ in range(2):
                proxy.cut()
                assert add.delay(1, 2).get(timeout=20) == 3
    assert told == ["ready"]


def test_it_leaves_profilers_and_coverage_alone(app: FastQ) -> None:
    @app.task
    def soon(seconds: float) -> None:
        busy(seconds)

    with worker(app):
        assert soon.delay(0.0).get(timeout=20) is None
        with pytest.raises(TimeLimitExceeded):
            soon.apply_async((20.0,), time_limit=0.2).get(timeout=20)
    steps: list[str] = []

    def profiled() -> None:
        sys.setprofile(lambda frame, event, argument: steps.append(event))
        busy(0.02)
        sys.setprofile(None)

    thread = threading.Thread(target=profiled, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert "call" in steps


def test_calls_run_in_a_thread_of_this_process(app: FastQ) -> None:
    seen: list[Any] = []

    @app.task
    def note(value: int) -> int:
        seen.append((value, os.getpid(), threading.current_thread() is threading.main_thread()))
        return value + 1

    before = threading.active_count()
    with worker(app):
        assert note.delay(1).get(timeout=20) == 2
    assert seen == [(1, os.getpid(), False)]
    assert threading.active_count() <= before + 1  # the space's own, for callbacks


def assert_ready_in_no_time(app: FastQ | celery.Celery) -> None:
    took: list[float] = []
    while not took or (took[-1] >= READY_S and len(took) < ROUNDS):
        began = time.perf_counter()
        with worker(app):
            took.append(time.perf_counter() - began)
    print(f"ready within {took[-1] * 1000:.1f} ms, the {len(took)}th time")
    assert took[-1] < READY_S


def test_it_is_ready_in_no_time(app: FastQ) -> None:
    assert_ready_in_no_time(app)


def test_what_the_test_and_what_a_task_sends_both_arrive(app: FastQ) -> None:
    @app.task
    def add(a: int, b: int) -> int:
        return a + b

    @app.task
    def send(a: int) -> str:
        return add.delay(a, 1).id

    with worker(app):
        for number in range(20):
            sent, other = send.delay(number), add.delay(number, 2)
            assert app.AsyncResult(sent.get(timeout=20)).get(timeout=20) == number + 1
            assert other.get(timeout=20) == number + 2
    publisher = app.publisher
    add.delay(1, 1)
    assert publisher.depth("celery") == 1


def test_errors_and_retries_are_as_in_any_worker(app: FastQ) -> None:
    @app.task(bind=True, max_retries=2)
    def again(self: Any) -> int:
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return int(self.request.retries)

    @app.task
    def fail() -> None:
        raise ValueError("no")

    with worker(app):
        assert again.delay().get(timeout=20) == 2
        with pytest.raises(ValueError, match="no"):
            fail.delay().get(timeout=20)


def test_the_soft_limit_is_raised_between_two_steps(app: FastQ) -> None:
    @app.task(soft_time_limit=0.1)
    def polite() -> str:
        try:
            busy(30)
        except SoftTimeLimitExceeded:
            return "tidied up"
        return "done"

    @app.task(soft_time_limit=0.2)
    def quick() -> int:
        return 1

    with worker(app):
        assert polite.delay().get(timeout=20) == "tidied up"
        assert [quick.delay().get(timeout=20) for _ in range(5)] == [1] * 5
        time.sleep(0.3)  # no limit of a call that is over strikes a later one
        assert quick.delay().get(timeout=20) == 1


def test_the_hard_limit_ends_the_call_and_the_worker_goes_on(app: FastQ) -> None:
    @app.task
    def stubborn(seconds: float) -> str:
        try:
            busy(seconds)
        except Exception:
            return "caught"
        return "done"

    with worker(app, time_limit=0.2):
        error = stubborn.delay(30).get(timeout=20, propagate=False)
        assert isinstance(error, TimeLimitExceeded)
        assert stubborn.delay(0).get(timeout=20) == "done"


def test_a_call_that_does_not_end_is_an_error_of_the_test(app: FastQ) -> None:
    over = threading.Event()

    @app.task(time_limit=0.1)
    def stuck() -> None:
        over.wait(30)

    with pytest.raises((PoolLost, FastqError), match=r"does not end|has not ended"), worker(app, timeout_s=3):
        assert isinstance(stuck.delay().get(timeout=20, propagate=False), TimeLimitExceeded)
    over.set()


def test_the_end_of_the_block_lets_the_call_end(app: FastQ) -> None:
    began, ended = threading.Event(), threading.Event()

    @app.task
    def slow() -> None:
        began.set()
        busy(0.3)
        ended.set()

    with worker(app):
        slow.delay()
        assert began.wait(20)
    assert ended.is_set()


def test_real_children_are_there_for_the_asking(app: FastQ) -> None:
    pid = app.task(name="pid")(os.getpid)
    with worker(app, pool="prefork", concurrency=2):
        assert pid.delay().get(timeout=20) != os.getpid()


def test_settings_may_be_others_meanwhile(app: FastQ) -> None:
    pid = app.task(name="pid")(os.getpid)
    with app.override(broker_url="memory://elsewhere", result_backend="memory://elsewhere"), worker(app):
        assert pid.delay().get(timeout=20) == os.getpid()
    with worker(app):
        assert pid.delay().get(timeout=20) == os.getpid()


def test_what_is_no_application_is_an_error() -> None:
    with pytest.raises(SettingsError, match="FastQ or a Celery application"), worker(7):  # type: ignore[arg-type]
        pass


# --- Celery's ---------------------------------------------------------------------------------------------------------


def test_a_celery_application_on_memory(celery_app: celery.Celery) -> None:
    @celery_app.task
    def add(a: int, b: int) -> int:
        return a + b

    @celery_app.task(bind=True)
    def again(self: Any) -> int:
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return int(self.request.retries)

    @celery_app.task
    def fail() -> None:
        raise ValueError("no")

    early = add.delay(20, 1)
    current = celery.current_app._get_current_object()
    for _ in range(2):
        with worker(celery_app):
            assert add.delay(1, 2).get(timeout=20) == 3
            assert early.get(timeout=20) == 21
            assert again.delay().get(timeout=20) == 2
            assert chain(add.s(1, 2), add.s(3)).apply_async().get(timeout=20) == 6
            with pytest.raises(ValueError, match="no"):
                fail.delay().get(timeout=20)
    assert celery.current_app._get_current_object() is current
    assert not celery_app.use_fast_trace_task
    late = add.delay(1, 1)
    assert Channel.queues["celery"].qsize() == 1
    with worker(celery_app):
        assert late.get(timeout=20) == 2


@pytest.mark.parametrize("options", [{}, {"autoretry_for": (KeyError,)}], ids=["plain", "autoretry"])
def test_coroutine_functions_of_a_celery_application_are_its_own_again(
    celery_app: celery.Celery, options: dict[str, Any]
) -> None:
    class Handling(celery.Task):
        async def on_success(self, *args: Any) -> None:
            seen.append(args[0])

    seen: list[int] = []

    @celery_app.task(base=Handling, name=f"doubled.{len(options)}", **options)
    async def doubled(number: int) -> int:
        return 2 * number

    for number in (1, 2):
        with worker(celery_app):
            assert doubled.delay(number).get(timeout=5) == 2 * number
        assert asyncio.run(doubled.run(number)) == 2 * number
        asyncio.run(doubled.on_success(8, "id", (), {}))
    assert seen == [2, 8, 4, 8]


def test_a_coroutine_awaits_a_handler_of_its_task(celery_app: celery.Celery) -> None:
    class Handling(celery.Task):
        async def on_failure(self, *args: Any) -> None:
            seen.append(args[1])

    seen: list[str] = []

    @celery_app.task(base=Handling, bind=True, name="awaits_handler")
    async def awaits_handler(self: Any) -> int:
        await self.on_failure(ValueError(), "shared", (), {}, None)
        return 1

    with worker(celery_app):
        assert awaits_handler.delay().get(timeout=5) == 1
    assert seen == ["shared"]


def test_what_a_test_has_patched_stays_patched(celery_app: celery.Celery) -> None:
    class Handling(celery.Task):
        async def on_success(self, *args: Any) -> None: ...

    @celery_app.task(base=Handling, name="patched")
    def patched() -> int:
        return 1

    with (
        mock.patch.object(patched, "run", return_value=7) as run,
        mock.patch.object(patched, "on_failure") as on_failure,
        mock.patch.object(Handling, "on_success") as on_success,
    ):
        with worker(celery_app):
            assert patched.delay().get(timeout=5) == 7
        assert patched.run is run
        assert patched.on_failure is on_failure
    run.assert_called_once()
    on_success.assert_called_once()


def test_a_celery_worker_is_ready_in_no_time(celery_app: celery.Celery) -> None:
    assert_ready_in_no_time(celery_app)


def test_limits_of_a_celery_application(celery_app: celery.Celery) -> None:
    @celery_app.task
    def wait(seconds: float) -> str:
        busy(seconds)
        return "done"

    with worker(celery_app):
        with pytest.raises(celery.exceptions.SoftTimeLimitExceeded):
            wait.apply_async((30,), soft_time_limit=0.2).get(timeout=20)
        with pytest.raises(celery.exceptions.TimeLimitExceeded):
            wait.apply_async((30,), time_limit=0.2).get(timeout=20)
        assert wait.delay(0).get(timeout=20) == "done"
