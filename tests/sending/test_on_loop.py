"""Sending from coroutines: the same calls as without, on one connection for each loop, and never a blocked loop."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import redis as redis_py
import uvloop

from fastq import FastQ, Task
from fastq.errors import (
    ConnectionLost,
    EncodeError,
    FastqError,
    NotRegistered,
    PublishError,
    ResultTimeout,
    SettingsError,
)
from fastq.interfaces import AsyncPublisher
from fastq.request import Request, pop_request, push_request
from fastq.result import EagerResult
from fastq.testing import worker
from fastq.wire.ids import new_id
from tests.support.conformance import in_child
from tests.support.conformance.async_publishers import turning
from tests.support.fault_proxy import FaultProxy
from tests.support.recording import RecordingPublisher, RecordingStore, body, headers, received
from tests.support.servers import RabbitMQ, Redis

Run: TypeAlias = "Callable[[Coroutine[Any, Any, Any]], Any]"
QUICK = {"max_retries": 3, "interval_start": 0, "interval_step": 0, "interval_max": 0}


def make_app(**settings: Any) -> FastQ:
    app = FastQ("proj", broker="memory://", **settings)
    app.publisher = RecordingPublisher()
    app.store = RecordingStore()
    return app


def sent(app: FastQ) -> RecordingPublisher:
    publisher = app.publisher
    assert isinstance(publisher, RecordingPublisher)
    return publisher


def add(x: int, y: int = 0) -> int:
    return x + y


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a coroutine on a new loop; what is left open when it ends is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield request.param
        gc.collect()


def test_what_is_sent_is_the_same_message() -> None:
    app = make_app(task_routes={"by.name": "elsewhere"})
    app.store = RecordingStore("reply-here")
    task = app.task(name="add", priority=3)(add)
    options: Any = {"headers": {"tenant": "acme"}, "queue": "q", "countdown": 60, "task_id": "an-id"}

    async def send() -> None:
        assert (await task.adelay(1, y=2)).task_id
        await task.aapply_async((1,), {"y": 2}, **options)
        await app.asend_task("by.name", [1], {"k": 2}, shadow="s")

    asyncio.run(send())
    task.delay(1, y=2)
    task.apply_async((1,), {"y": 2}, **options)
    app.send_task("by.name", [1], {"k": 2}, shadow="s")
    messages = sent(app).messages
    own = {"id", "root_id", "eta"}
    for first, second in zip(messages[:3], messages[3:], strict=True):
        assert first.body == second.body
        assert (first.routing_key, first.priority) == (second.routing_key, second.priority)
        assert {k: v for k, v in headers(first).items() if k not in own} == {
            k: v for k, v in headers(second).items() if k not in own
        }
        assert b"reply-here" in first.props
    assert [message.routing_key for message in messages[:3]] == ["celery", "q", "elsewhere"]
    assert headers(messages[1])["id"] == "an-id"


def test_what_is_refused_is_refused_before_anything_is_sent() -> None:
    app = make_app()
    task = app.task(add)

    async def send() -> None:
        with pytest.raises(TypeError, match="missing a required argument"):
            await task.adelay()  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="'coutdown'"):
            await task.aapply_async((1,), coutdown=5)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="args is 'ab'"):
            await task.aapply_async("ab")
        with pytest.raises(TypeError, match=r"asend_task\(\)"):
            await app.asend_task("x", nonsense=1)  # type: ignore[call-arg]
        with pytest.raises(EncodeError, match="argument 1"):
            await task.adelay(object())  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError), match="priority"):
            await task.aapply_async((1,), priority=999)

    asyncio.run(send())
    assert sent(app).messages == []


def test_publishing_is_tried_again_and_what_was_confirmed_is_not() -> None:
    app = make_app(task_publish_retry_policy=QUICK)
    task = app.task(add)

    async def send() -> None:
        sent(app).failures = [ConnectionLost("gone"), PublishError("refused")]
        await task.adelay(1)
        sent(app).failures = [ConnectionLost(str(number)) for number in range(5)]
        with pytest.raises(ConnectionLost, match="3"):
            await task.adelay(2)
        sent(app).failures = [PublishError("too late", again=())]
        with pytest.raises(PublishError, match="too late"):
            await task.adelay(3)
        sent(app).failures = [ConnectionLost("gone")]
        with pytest.raises(ConnectionLost):
            await task.aapply_async((4,), retry=False)
        sent(app).failures = [SettingsError("wrong password")]
        with pytest.raises(SettingsError):
            await task.adelay(5)

    asyncio.run(send())
    assert [body(message)[0] for message in sent(app).messages] == [[1]]


def test_a_running_call_has_what_it_sends_as_children() -> None:
    app = make_app()
    task = app.task(add)
    request = Request.local("parent", (), {}, id="id-1")

    async def send() -> Any:
        push_request(request)
        try:
            return await task.adelay(1)
        finally:
            pop_request()

    child = asyncio.run(send())
    assert request.children == [child]
    assert headers(sent(app).messages[0])["parent_id"] == "id-1"


def test_eager_runs_it_here() -> None:
    app = make_app(task_always_eager=True)
    task = app.task(name="add")(add)

    async def send() -> None:
        result = await task.adelay(1, 2)
        assert isinstance(result, EagerResult)
        assert await result.aget() == 3
        assert await (await app.asend_task("add", (3, 4))).aget() == 7
        with pytest.raises(NotRegistered):
            await app.asend_task("elsewhere")

    asyncio.run(send())
    assert sent(app).messages == []


def test_an_apply_async_of_the_users_sees_every_call() -> None:
    app = make_app()
    seen: list[Any] = []
    threads: list[threading.Thread] = []

    class Own(Task[..., Any]):
        def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            seen.append(("blocking", args))
            threads.append(threading.current_thread())
            return super().apply_async(args, kwargs, **options)

    class OwnToo(Own):
        async def aapply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            seen.append(("async", args))
            return await super().aapply_async(args, kwargs, **options)

    first, second = app.task(name="first", base=Own)(add), app.task(name="second", base=OwnToo)(add)

    async def send() -> None:
        for _ in range(2):
            await first.adelay(1)
            await second.adelay(2)

    asyncio.run(send())
    assert seen[:2] == [("blocking", (1,)), ("async", (2,))]
    assert len(sent(app).messages) == 4
    assert threading.current_thread() not in threads
    # In a worker it hands the message over, from the thread of the call.
    threads.clear()
    call = received(sent(app).messages[0])
    push_request(Request.from_call(call, (), {}))
    try:
        asyncio.run(send())
    finally:
        pop_request()
    assert set(threads) == {threading.current_thread()}


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_published_at_its_end() -> None:
    app = make_app()
    task = app.task(add)

    async def send() -> None:
        async with app.abatch():
            await task.adelay(1)
            task.delay(2)
            await asyncio.gather(task.adelay(3), app.asend_task("x"))
            async with app.abatch():
                await task.adelay(4)
            assert sent(app).batches == []
        assert len(sent(app).batches) == 1
        with app.batch():
            await task.adelay(5)
        async with app.abatch():
            pass

    asyncio.run(send())
    assert [len(batch) for batch in sent(app).batches] == [5, 1]


def test_a_batch_collects_nothing_of_other_coroutines_and_nothing_after_its_end() -> None:
    app = make_app()
    task = app.task(add)

    async def send() -> None:
        inside, done = asyncio.Event(), asyncio.Event()

        async def other() -> None:
            await inside.wait()
            await task.adelay(1)
            task.delay(2)
            done.set()

        async def outlives() -> None:
            await ended.wait()
            await task.adelay(4)

        ended = asyncio.Event()
        running = asyncio.ensure_future(other())
        async with app.abatch():
            await task.adelay(3)
            late = asyncio.ensure_future(outlives())
            inside.set()
            await done.wait()
            assert [body(message)[0] for message in sent(app).messages] == [[1], [2]]
        ended.set()
        await asyncio.gather(running, late)

    asyncio.run(send())
    assert [body(message)[0] for message in sent(app).messages] == [[1], [2], [3], [4]]


def test_after_an_exception_in_the_block_nothing_is_published() -> None:
    app = make_app()
    task = app.task(add)

    async def send() -> None:
        with suppress(ZeroDivisionError):
            async with app.abatch():
                result = await task.adelay(1)
                with pytest.raises(RuntimeError, match="would wait for ever"):
                    await result.aget()
                raise ZeroDivisionError("by hand")
        with pytest.raises(RuntimeError, match="was never sent"):
            await result.aget()
        with pytest.raises(RuntimeError, match="was never sent"):
            await anext(result.stream())

    asyncio.run(send())
    assert sent(app).messages == []


# --- loops and processes ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["amqp", "redis", "sqlite"])
def url(request: pytest.FixtureRequest) -> str:
    """A fresh broker; its database is empty."""
    if request.param == "redis":
        server: Redis = request.getfixturevalue("redis_server")
        url = server.url(7)
        with redis_py.Redis.from_url(url) as client:
            client.flushdb()
        return url
    return str(request.getfixturevalue(f"{request.param}_url"))


def test_one_loop_after_the_other(run: Run, url: str) -> None:
    app = FastQ("proj", broker=url)
    task = app.task(add)

    async def send() -> None:
        await asyncio.gather(*(task.adelay(number) for number in range(20)))

    run(send())  # what is open is closed with the loop
    run(send())
    gc.collect()
    assert app.publisher.depth("celery") == 40

    async def close() -> None:
        await send()
        await app.aclose()
        await app.aclose()
        await send()
        await app.aclose()

    run(close())
    assert app.publisher.depth("celery") == 80
    app.close()


def test_a_loop_that_is_closed_by_hand(url: str) -> None:
    app = FastQ("proj", broker=url)
    task = app.task(add)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(task.adelay(1))
    app.close()  # from outside: the loop does it when it turns next
    loop.run_until_complete(asyncio.sleep(0.1))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    asyncio.run(app.loop_sender.aclose())
    assert app.publisher.depth("celery") == 1
    app.close()


def test_two_loops_at_once(run: Run, url: str) -> None:
    app = FastQ("proj", broker=url)
    task = app.task(add)

    async def send() -> None:
        for number in range(50):
            await task.adelay(number)

    threads = [threading.Thread(target=run, args=(send(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert app.publisher.depth("celery") == 150
    app.close()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_has_a_connection_of_its_own(run: Run, url: str) -> None:
    app = FastQ("proj", broker=url)
    task = app.task(add)

    async def send() -> None:
        await task.adelay(1)

    async def fork() -> None:
        await task.adelay(0)
        assert in_child(lambda: run(send())) == "returned None"
        await asyncio.gather(*(task.adelay(2) for _ in range(5)))

    run(fork())
    assert app.publisher.depth("celery") == 7
    app.close()


def test_an_override_has_connections_of_its_own(run: Run, url: str) -> None:
    app = FastQ("proj", broker=url)
    task = app.task(add)

    async def send() -> None:
        await task.adelay(1)
        aside = f"memory://{new_id()}"
        with app.override(broker_url=aside, result_backend=aside):
            await task.adelay(2)
            assert app.publisher.depth("celery") == 1
        await task.adelay(3)

    run(send())
    assert app.publisher.depth("celery") == 2
    app.close()


def test_a_publisher_that_is_set_is_used_from_then_on(url: str) -> None:
    app = FastQ("proj", broker=url)
    task = app.task(add)
    other = RecordingPublisher()

    async def send() -> None:
        await task.adelay(1)
        app.publisher = other
        await task.adelay(2)
        app.publisher = None  # type: ignore[assignment]
        await task.adelay(3)

    asyncio.run(send())
    assert app.publisher.depth("celery") == 2
    assert [body(message)[0] for message in other.messages] == [[2]]
    app.close()


def test_a_program_that_ends_says_nothing(url: str) -> None:
    script = (
        "import asyncio\n"
        "from fastq import FastQ\n"
        f"app = FastQ('script', broker={url!r}, backend={url!r} if 'amqp' not in {url!r} else 'rpc://')\n"
        "async def main():\n"
        "    await asyncio.gather(*(app.asend_task('t') for _ in range(100)))\n"
        "    try: await app.AsyncResult('x').aget(timeout=0.1)\n"
        "    except TimeoutError: print('in time')\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", script],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    noise = [line for line in done.stderr.splitlines() if "took" not in line and "did not exist" not in line]
    assert (done.returncode, done.stdout, noise) == (0, "in time\n", [])


# --- silence ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("broker", "backend"),
    [
        ("amqp://127.0.0.1:{port}//", "disabled"),
        ("amqp://127.0.0.1:{port}//", "rpc://"),
        ("redis://127.0.0.1:{port}/0", "disabled"),
        ("memory://silence", "redis://127.0.0.1:{port}/0"),
    ],
)
def test_the_loop_turns_while_a_server_says_nothing(run: Run, broker: str, backend: str, silent_port: int) -> None:
    app = FastQ(
        "test", broker=broker.format(port=silent_port), backend=backend.format(port=silent_port),
        fastq_publish_timeout=1.0, broker_connection_timeout=0.4, redis_socket_timeout=1.0,
    )  # fmt: skip
    task = app.task(add)

    async def main() -> None:
        began = time.monotonic()
        if "memory" not in broker:
            failed = await turning(asyncio.gather(*(task.adelay(1) for _ in range(5)), return_exceptions=True))  # type: ignore[arg-type]
            assert all(isinstance(error, (ConnectionLost, PublishError)) for error in failed)
            assert time.monotonic() - began < 3
        if backend != "disabled":
            result = app.AsyncResult("unknown")

            async def read() -> None:
                async for state in result.stream(timeout=0.3):
                    assert state.state == "PENDING"

            for waiting in (result.aget(timeout=0.3), read()):
                with pytest.raises((FastqError, ResultTimeout)):
                    await turning(waiting)  # type: ignore[arg-type]
        app_closing = app.aclose()
        await turning(app_closing)

    began = time.monotonic()
    run(main())
    assert time.monotonic() - began < 8


@pytest.mark.redis
@pytest.mark.rabbitmq
@pytest.mark.parametrize("kind", ["amqp", "redis"])
def test_what_was_lost_with_its_connection_is_sent_again_by_itself(
    run: Run, kind: str, request: pytest.FixtureRequest, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    server: RabbitMQ | Redis = request.getfixturevalue("rabbitmq" if kind == "amqp" else "redis_server")
    url = request.getfixturevalue("amqp_url") if kind == "amqp" else server.url(6)  # type: ignore[call-arg]
    if kind == "redis":
        with redis_py.Redis.from_url(url) as client:
            client.flushdb()
    proxy = fault_proxy("127.0.0.1", server.port)
    app = FastQ("proj", broker=proxy.url(url))
    task = app.task(add)

    async def main() -> None:
        await task.adelay(0)
        proxy.stall()
        waiting = asyncio.gather(*(task.adelay(number) for number in range(50)))
        await asyncio.sleep(0.1)
        proxy.cut()
        proxy.resume()
        await waiting

    run(main())
    outside = FastQ("outside", broker=url)
    assert outside.publisher.depth("celery") == 51
    outside.close()
    app.close()


# --- in a worker ------------------------------------------------------------------------------------------------------


def test_in_a_worker_messages_go_through_the_child_s_pipe(sqlite_url: str) -> None:
    app = FastQ("proj", broker=sqlite_url, backend=sqlite_url)

    @app.task(name="part")
    def part(number: int) -> int:
        return number * 10

    @app.task(name="whole")
    def whole(count: int) -> list[str]:
        async def send() -> list[str]:
            loop = asyncio.get_running_loop()
            turns: list[int] = []
            loop.call_soon(turns.append, 1)
            first = await part.adelay(0)
            assert turns == []  # handed over at once, so it belongs to this call
            others = await asyncio.gather(*(part.adelay(number) for number in range(1, count)))
            return [each.id for each in (first, *others)]

        return asyncio.run(send())

    with worker(app):
        parent = whole.delay(3)
        ids = parent.get(timeout=10)
        assert [app.AsyncResult(task_id).get(timeout=10) for task_id in ids] == [0, 10, 20]
        assert [child.id for child in parent.children] == ids
    app.close()


def test_the_states_of_a_call_in_a_real_worker(url: str) -> None:
    app = FastQ("proj", broker=url, backend="rpc://" if url.startswith("amqp") else url)
    # The next step is taken when the one before was seen, by those that look now and then too.
    steps = {number: Path(tempfile.mkdtemp()) / "seen" for number in (1, 2)}

    @app.task(name="work", bind=True, track_started=True)
    def work(self: Task[..., Any]) -> str:
        for number, seen in steps.items():
            self.update_state(state="STEP", meta=number)
            until = time.monotonic() + 10
            while not seen.exists() and time.monotonic() < until:
                time.sleep(0.01)
        raise ValueError("the end")

    async def read() -> list[tuple[str, Any]]:
        result = await work.adelay()
        found = []
        async for progress in result.stream(timeout=10):
            found.append((progress.state, progress.value))
            if progress.state == "STEP":
                steps[progress.value].touch()
        with pytest.raises(ValueError, match="the end"):
            await result.aget(timeout=1)
        await app.aclose()
        return found

    with worker(app):
        found = asyncio.run(read())
    assert found[0][0] in ("PENDING", "STARTED", "STEP")
    assert [each for each in found if each[0] == "STEP"] == [("STEP", 1), ("STEP", 2)]
    state, error = found[-1]
    assert (state, type(error), str(error)) == ("FAILURE", ValueError, "the end")


def test_a_publisher_s_own_form_for_loops_is_used() -> None:
    class OnLoop:
        async def publish(self, messages: Any, deadline: float | None = None) -> None:
            found.extend(messages)

        async def declare(self, queue: str, deadline: float | None = None) -> None: ...

        async def close(self) -> None: ...

    class Own(RecordingPublisher):
        def on_loop(self) -> AsyncPublisher:
            return OnLoop()

    app = make_app()
    app.publisher = Own()
    found: list[Any] = []
    asyncio.run(app.task(add).adelay(1))  # type: ignore[arg-type]
    assert len(found) == 1
    assert sent(app).messages == []
