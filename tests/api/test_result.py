"""Results: waiting, states, exceptions and what the worker's side knows, against a store in memory."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from fastq import FastQ, Task
from fastq.codecs.meta import encode_meta
from fastq.errors import RemoteError, ResultsDisabled, ResultTimeout
from fastq.request import Request, pop_request, push_request
from fastq.result import AsyncResult, RemoteTraceback
from tests.support.conformance.async_publishers import soon
from tests.support.recording import RecordingPublisher, RecordingStore, received


@pytest.fixture
def store() -> RecordingStore:
    return RecordingStore()


@pytest.fixture
def app(store: RecordingStore) -> FastQ:
    app = FastQ("proj", broker="memory://")
    app.publisher = RecordingPublisher()
    app.store = store
    return app


@pytest.fixture
def task(app: FastQ) -> Task[[int], int]:
    @app.task(name="double", throws=KeyError)
    def double(x: int) -> int:
        return 2 * x

    return double


def finish(store: RecordingStore, result: AsyncResult[Any], state: str, value: Any, **more: Any) -> None:
    store.save(result.id, state, encode_meta(result.id, state, value, **more))


def later(store: RecordingStore, result: AsyncResult[Any], state: str, value: Any) -> threading.Thread:
    """Store a result from another thread after a moment."""

    def save() -> None:
        time.sleep(0.02)
        finish(store, result, state, value)

    thread = threading.Thread(target=save)
    thread.start()
    return thread


def test_get_waits_for_the_value(task: Task[[int], int], store: RecordingStore) -> None:
    result = task.delay(2)
    thread = later(store, result, "SUCCESS", 4)
    assert result.get(timeout=5) == 4
    thread.join()
    store.metas.clear()
    assert result.get() == 4
    assert result.state == "SUCCESS"


def test_get_runs_out_of_time(task: Task[[int], int]) -> None:
    with pytest.raises(ResultTimeout):
        task.delay(2).get(timeout=0.01)
    with pytest.raises(TimeoutError):
        task.delay(2).get(timeout=0.01)


@pytest.mark.parametrize("timeout", ["x", True, timedelta(seconds=5)])
def test_a_wrong_timeout_is_named(task: Task[[int], int], timeout: Any) -> None:
    result = task.delay(2)
    words = re.escape(f"timeout is {timeout!r}; expected a number of seconds")
    with pytest.raises(TypeError, match=words):
        result.get(timeout=timeout)
    with pytest.raises(TypeError, match=words):
        asyncio.run(result.aget(timeout=timeout))
    with pytest.raises(TypeError, match=words):
        asyncio.run(read(result, timeout))
    with pytest.raises(TypeError, match=words):
        task.apply((2,)).get(timeout=timeout)


def test_a_task_that_is_not_known_is_pending(app: FastQ) -> None:
    result = app.AsyncResult("unknown")
    assert (result.state, result.status, result.result, result.info) == ("PENDING", "PENDING", None, None)
    assert (result.ready(), result.successful(), result.failed()) == (False, False, False)
    assert (result.traceback, result.children, result.date_done, result.name) == (None, [], None, None)


def test_a_final_state_is_asked_for_once_and_others_each_time(task: Task[[int], int], store: RecordingStore) -> None:
    result = task.delay(2)
    finish(store, result, "STARTED", {"pid": 5})
    assert (result.state, result.result) == ("STARTED", {"pid": 5})
    before = store.loads
    finish(store, result, "SUCCESS", 4)
    assert (result.state, result.result, result.successful(), result.failed()) == ("SUCCESS", 4, True, False)
    assert store.loads == before + 1


def test_everything_that_is_stored_can_be_asked_for(app: FastQ, task: Task[[int], int], store: RecordingStore) -> None:
    result = app.AsyncResult("id")
    extended = {"name": "double", "args": [2], "kwargs": {}, "worker": "w@h", "retries": 1, "queue": "q"}
    finish(store, result, "SUCCESS", 4, children=["child"], extended=extended)
    assert result.children == [AsyncResult("child", app)]
    assert (result.name, result.args, result.kwargs) == ("double", [2], {})
    assert (result.worker, result.retries, result.queue) == ("w@h", 1, "q")
    done = result.date_done
    assert done is not None
    assert abs((datetime.now(timezone.utc) - done).total_seconds()) < 5
    assert task.delay(2).name == "double"


def test_a_failure_is_raised_with_the_worker_s_traceback_as_its_cause(
    task: Task[[int], int], store: RecordingStore
) -> None:
    result = task.delay(2)
    finish(store, result, "FAILURE", ValueError("bad", 5), traceback="Traceback of the worker")
    with pytest.raises(ValueError) as raised:
        result.get()
    assert raised.value.args == ("bad", 5)
    assert isinstance(raised.value.__cause__, RemoteTraceback)
    assert "Traceback of the worker" in str(raised.value.__cause__)
    assert (result.failed(), result.ready(), result.traceback) == (True, True, "Traceback of the worker")
    assert isinstance(result.result, ValueError)
    returned: Any = result.get(propagate=False)
    assert isinstance(returned, ValueError)


def test_a_revoked_task_raises_and_a_retried_one_shows_its_reason(
    app: FastQ, task: Task[[int], int], store: RecordingStore
) -> None:
    revoked = task.delay(2)
    finish(
        store, revoked, "REVOKED", {"exc_type": "TaskRevoked", "exc_message": ["revoked"], "exc_module": "fastq.errors"}
    )
    with pytest.raises(Exception, match="revoked") as raised:
        revoked.get()
    assert type(raised.value).__name__ == "TaskRevoked"
    retried = task.delay(2)
    finish(store, retried, "RETRY", OSError("down"))
    assert isinstance(retried.result, OSError)
    assert not retried.ready()


class OwnError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def test_an_exception_that_the_task_throws_is_rebuilt_by_its_constructor(app: FastQ, store: RecordingStore) -> None:
    naming = app.task(name="naming", throws=(OwnError,))(print)
    silent = app.task(name="not-naming")(print)
    stored = {"exc_type": "OwnError", "exc_message": [7], "exc_module": __name__}
    for task, expected in ((naming, OwnError), (silent, RemoteError)):
        result = task.delay()
        finish(store, result, "FAILURE", stored)
        error = result.get(propagate=False)
        assert isinstance(error, expected)
        assert type(error).__name__ == "OwnError"
    assert app.AsyncResult(result.id).get(propagate=False).args == (7,)


def test_forget_drops_what_is_stored(task: Task[[int], int], store: RecordingStore) -> None:
    result = task.delay(2)
    finish(store, result, "SUCCESS", 4)
    assert result.ready()
    result.forget()
    assert store.metas == {}
    assert result.state == "PENDING"


def test_an_ignored_result_says_so_instead_of_waiting_for_ever(app: FastQ) -> None:
    silent = app.task(name="silent", ignore_result=True)(print)
    result = silent.delay()
    assert result.ignored
    with pytest.raises(ResultsDisabled, match=r"silent\[.*ignore_result"):
        result.get()
    with pytest.raises(ResultsDisabled):
        asyncio.run(result.aget())


def test_waiting_inside_a_running_task_is_refused_unless_it_is_allowed(
    app: FastQ, task: Task[[int], int], store: RecordingStore
) -> None:
    result = task.delay(2)
    finish(store, result, "SUCCESS", 4)
    publisher = app.publisher
    assert isinstance(publisher, RecordingPublisher)
    push_request(Request.from_call(received(publisher.messages[0]), [2], {}))
    try:
        with pytest.raises(RuntimeError, match="disable_sync_subtasks=False"):
            result.get(timeout=1)
        assert result.get(timeout=1, disable_sync_subtasks=False) == 4
        assert result.state == "SUCCESS"
        assert task.apply((3,)).get() == 6
    finally:
        pop_request()
    assert result.get(timeout=1) == 4


def test_results_are_equal_by_id_and_read_well(app: FastQ) -> None:
    one, same, other = app.AsyncResult("a"), app.AsyncResult("a"), app.AsyncResult("b")
    assert one == same != other
    assert len({one, same, other}) == 2
    assert one != "a"
    assert (str(one), repr(one), one.task_id) == ("a", "<AsyncResult: a>", "a")


# --- aget -------------------------------------------------------------------------------------------------------------


def test_aget_waits_without_blocking_the_loop(task: Task[[int], int], store: RecordingStore) -> None:
    result = task.delay(2)

    async def main() -> tuple[int, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.ensure_future(tick())
        thread = later(store, result, "SUCCESS", 4)
        value = await result.aget(timeout=5)
        thread.join()
        ticking.cancel()
        return value, ticks

    value, ticks = asyncio.run(main())
    assert value == 4
    assert ticks > 3


def test_aget_of_many_at_once(task: Task[[int], int], store: RecordingStore) -> None:
    results = [task.delay(number) for number in range(50)]

    async def main() -> list[int]:
        waiting = asyncio.gather(*(result.aget(timeout=5) for result in results))
        await asyncio.sleep(0)
        thread = threading.Thread(
            target=lambda: [finish(store, result, "SUCCESS", i) for i, result in enumerate(results)]
        )
        thread.start()
        values = await waiting
        thread.join()
        return values

    assert asyncio.run(main()) == list(range(50))


def test_aget_of_what_is_known_already(task: Task[[int], int], store: RecordingStore) -> None:
    result = task.delay(2)
    finish(store, result, "SUCCESS", 4)
    assert asyncio.run(result.aget()) == 4
    store.metas.clear()
    assert asyncio.run(result.aget()) == 4


def test_aget_raises_the_task_s_exception_and_runs_out_of_time(task: Task[[int], int], store: RecordingStore) -> None:
    result = task.delay(2)

    async def waiting() -> None:
        with pytest.raises(ResultTimeout, match=r"within 0\.01 s"):
            await result.aget(timeout=0.01)
        cancelled = asyncio.ensure_future(result.aget())
        await asyncio.sleep(0)
        assert len(store.watchers[result.id]) == 1
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert store.watchers[result.id] == []
        finish(store, result, "FAILURE", ValueError("bad"))
        with pytest.raises(ValueError, match="bad"):
            await result.aget(timeout=5)
        assert isinstance(await result.aget(propagate=False), ValueError)

    asyncio.run(waiting())


def test_a_result_that_comes_after_the_loop_is_gone_hurts_nobody(task: Task[[int], int], store: RecordingStore) -> None:
    result = task.delay(2)

    async def give_up() -> None:
        with pytest.raises(ResultTimeout):
            await result.aget(timeout=0.01)

    asyncio.run(give_up())
    finish(store, result, "SUCCESS", 4)
    assert result.get() == 4


# --- stream -----------------------------------------------------------------------------------------------------------


async def read(result: AsyncResult[Any], timeout: float | None = 5) -> list[tuple[str, Any]]:
    return [(progress.state, progress.value) async for progress in result.stream(timeout)]


def test_stream_yields_each_state_and_ends_with_the_last(task: Task[[int], int], store: RecordingStore) -> None:
    result = task.delay(2)

    async def main() -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        states = [("STARTED", {"pid": 1}), ("PROGRESS", 1), ("PROGRESS", 2), ("SUCCESS", 4)]
        async for progress in result.stream(timeout=5):
            found.append((progress.state, progress.value))
            assert progress.is_final is (progress.state == "SUCCESS")
            if states:
                finish(store, result, *states.pop(0))
        return found

    assert asyncio.run(main()) == [
        ("PENDING", None),
        ("STARTED", {"pid": 1}),
        ("PROGRESS", 1),
        ("PROGRESS", 2),
        ("SUCCESS", 4),
    ]
    assert store.observers[result.id] == []
    loads = store.loads
    assert asyncio.run(read(result)) == [("SUCCESS", 4)]  # known for good
    assert store.loads == loads


def test_stream_yields_a_failure_as_its_exception(task: Task[[int], int], store: RecordingStore) -> None:
    retried, failed = task.delay(2), task.delay(3)
    finish(store, retried, "RETRY", ValueError("again"))
    finish(store, failed, "FAILURE", KeyError("bad"))

    async def main() -> None:
        states = retried.stream()
        retry = await anext(states)
        assert (retry.state, repr(retry.value)) == ("RETRY", "ValueError('again')")
        await states.aclose()
        assert [(state, repr(value)) for state, value in await read(failed)] == [("FAILURE", "KeyError('bad')")]

    asyncio.run(main())


def test_stream_raises_when_no_state_comes_in_time(task: Task[[int], int], store: RecordingStore) -> None:
    result = task.delay(2)

    async def main() -> None:
        found = []

        async def read_on() -> None:
            async for progress in result.stream(timeout=0.05):
                found.append(progress.state)
                # The same state once more is no news.
                store.save(result.id, "PROGRESS", encode_meta(result.id, "PROGRESS", 1))

        with pytest.raises(ResultTimeout, match=r"no new state within 0\.05 s"):
            await read_on()
        assert found == ["PENDING", "PROGRESS"]

    asyncio.run(main())
    assert store.observers[result.id] == []


@pytest.mark.parametrize("end", ["break", "cancel", "loop"])
def test_who_reads_a_stream_no_longer_is_told_nothing_more(
    end: str, task: Task[[int], int], store: RecordingStore
) -> None:
    result = task.delay(2)

    async def main() -> None:
        reading = asyncio.ensure_future(read(result))
        await soon(lambda: store.observers.get(result.id))
        if end == "cancel":
            reading.cancel()
            await asyncio.wait([reading])
            assert store.observers[result.id] == []
        elif end == "break":
            async for _ in result.stream():
                break
            finish(store, result, "SUCCESS", 4)
            assert (await reading)[-1] == ("SUCCESS", 4)
            await soon(lambda: store.observers[result.id] == [])  # the loop ends what was left

    asyncio.run(main())
    assert store.observers[result.id] == []
    finish(store, result, "SUCCESS", 4)


def test_stream_is_refused_where_aget_is(task: Task[[int], int], app: FastQ) -> None:
    silent = app.task(name="silent", ignore_result=True)(lambda: None).delay()
    with pytest.raises(ResultsDisabled, match="ignore_result"):
        asyncio.run(read(silent))
    push_request(Request.local("outer", (), {}, id="x"))
    try:
        with pytest.raises(RuntimeError, match="inside a running task"):
            asyncio.run(read(task.delay(1)))
    finally:
        pop_request()
    assert asyncio.run(read(task.apply((3,)))) == [("SUCCESS", 6)]


def test_a_pickled_handle_reads_what_the_version_before_has_written() -> None:
    """A handle may lie in a cache or a session, or come from a process that is not restarted yet."""
    app = FastQ("pickles", broker="memory://pickles", backend="memory://pickles")
    handle = app.AsyncResult("an-id", "a.task")
    make, arguments, (_, state) = handle.__reduce__()
    assert state == {"_meta": None, "_unsent": None}
    again = make(*arguments)
    again.__setstate__((None, {"_meta": None, "_unsent": "ValueError: 3"}))
    with pytest.raises(RuntimeError, match=r"never sent: .*ValueError: 3"):
        again.get(timeout=1)
