"""Tasks that every kind of pool has to run, for a FastQ and a Celery application: plain, and as coroutine functions.

A body is a generator that yields for how many seconds the task is to wait. Of each body two tasks are made: ``name``
sleeps in its thread, ``name_async`` awaits. ``support.kinds`` knows which of them a kind runs.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeAlias

from tests.support.task_ledger import record, record_done, record_start

LEDGER = os.environ.get("FASTQ_TEST_LEDGER", "ledger.bin")
STOPPED = b"stopped\0"  # a soft limit was seen inside of the task
PAUSE_S = 0.01
SENT_BY_TASKS = 10_000

Steps: TypeAlias = "Generator[float, None, Any]"
Body: TypeAlias = "Callable[..., Steps]"

#: Whose sockets this application has found when it was imported.
SOCKETS_AT_IMPORT = socket.socket.__module__
if "FASTQ_TEST_LEDGER" in os.environ:
    # A child ends without this; of the main process it is the last word.
    atexit.register(
        lambda: os.write(2, f"sockets of {os.getpid()}: {SOCKETS_AT_IMPORT}, {socket.socket.__module__}\n".encode())
    )

_mark: ContextVar[int | None] = ContextVar("mark", default=None)
_kept: list[bytearray] = []


@dataclass(frozen=True, slots=True)
class Words:
    """What the two kinds of application call differently. ``current_task()`` returns the task that runs."""

    soft_limit: type[Exception]
    ignore: type[Exception]
    reject: Callable[..., Exception]
    current_task: Callable[[], Any]
    logger: Any


def settings() -> dict[str, Any]:
    """Return the settings that the test has asked for."""
    found: dict[str, Any] = json.loads(os.environ.get("FASTQ_TEST_SETTINGS", "{}"))
    return found


def sleeping(body: Body) -> Callable[..., Any]:
    """Return the plain function of a body."""

    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        steps = body(*args, **kwargs)
        try:
            pause = next(steps)
            while True:
                try:
                    time.sleep(pause)
                except BaseException as error:
                    pause = steps.throw(error)
                else:
                    pause = next(steps)
        except StopIteration as end:
            return end.value

    return run


def awaiting(body: Body) -> Callable[..., Any]:
    """Return the coroutine function of a body."""

    @wraps(body)
    async def run(*args: Any, **kwargs: Any) -> Any:
        steps = body(*args, **kwargs)
        try:
            pause = next(steps)
            while True:
                try:
                    await asyncio.sleep(pause)
                except BaseException as error:
                    pause = steps.throw(error)
                else:
                    pause = next(steps)
        except StopIteration as end:
            return end.value

    return run


def add_tasks(app: Any, words: Words) -> None:
    """Give the application every task, in both ways."""

    def task(**options: Any) -> Callable[[Body], Body]:
        def add(body: Body) -> Body:
            app.task(name=body.__name__, bind=True, **options)(sleeping(body))
            app.task(name=f"{body.__name__}_async", bind=True, **options)(awaiting(body))
            return body

        return add

    def other(self: Any, name: str) -> Any:
        """Return the task of that name which runs in the same way as this one."""
        return app.tasks[f"{name}_async" if self.name.endswith("_async") else name]

    @task()
    def work(self: Any, number: int, seconds: float = 0.0) -> Steps:
        """Take that long and return the number."""
        record_start(LEDGER, number)
        if seconds:
            yield seconds
        record_done(LEDGER, number)
        return number

    @task()
    def until(self: Any, number: int, gate: str) -> Steps:
        """Wait until a file exists."""
        record_start(LEDGER, number)
        while not os.path.exists(gate):
            yield PAUSE_S
        record_done(LEDGER, number)
        return number

    @task()
    def who(self: Any, number: int, gate: str) -> Steps:
        """Return everything that this call is taken for, at any time, while others run."""
        record_start(LEDGER, number)
        before, _ = _mark.get(), _mark.set(number)
        seen = set()
        while True:
            is_over = os.path.exists(gate)
            running = words.current_task()
            seen.add((self.request.id, running.request.id, running.name, self.request.args[0], _mark.get()))
            if is_over:
                break
            yield PAUSE_S
        record_done(LEDGER, number)
        return {"before": before, "seen": sorted(seen)}

    @task()
    def where(self: Any, number: int) -> Steps:
        """Return the process, and what it is like for the task's code."""
        yield 0
        program = "import signal; print(signal.getsignal(signal.SIGTERM).name, len(signal.pthread_sigmask(0, ())))"
        child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return {
            "pid": os.getpid(),
            "stdin": os.readlink("/proc/self/fd/0"),
            "subprocess": child.stdout.split(),
            "thread": threading.current_thread().name,
        }

    @task()
    def sockets(self: Any, number: int) -> Steps:
        """Return whose sockets the process had when the application was imported, and whose it has now."""
        yield 0
        return [SOCKETS_AT_IMPORT, socket.socket.__module__]

    @task()
    def imports(self: Any, number: int, folder: str) -> Steps:
        """Return what a module has at its end that takes its time; say where it was stopped."""
        record_start(LEDGER, number)
        if folder not in sys.path:
            sys.path.append(folder)
        try:
            found = importlib.import_module("slow_module").last
            yield from _pieces(20)
        except words.soft_limit:
            return f"stopped with {getattr(sys.modules.get('slow_module'), 'last', 'half of it')}"
        return found

    @task()
    def stops_in_time(self: Any, number: int, seconds: float) -> Steps:
        """Clean up when the soft limit comes, which takes a moment, and return normally."""
        record_start(LEDGER, number)
        try:
            yield from _pieces(seconds)
        except words.soft_limit:
            record(LEDGER, STOPPED, number)
            yield PAUSE_S
            return "stopped in time"
        return "was not stopped"

    @task()
    def ignores_soft_limit(self: Any, number: int, seconds: float) -> Steps:
        """Go on after the soft limit."""
        record_start(LEDGER, number)
        try:
            yield from _pieces(seconds)
        except words.soft_limit:
            record(LEDGER, STOPPED, number)
        yield from _pieces(seconds)
        record_done(LEDGER, number)

    @task()
    def stuck(self: Any, number: int, seconds: float) -> Steps:
        """Block in C, a coroutine too."""
        yield PAUSE_S
        record_start(LEDGER, number)
        time.sleep(seconds)
        record_done(LEDGER, number)
        return number

    @task()
    def plus(self: Any, number: int, *others: int) -> Steps:
        """Return the sum."""
        yield PAUSE_S
        return number + sum(others)

    @task()
    def total(self: Any, numbers: list[int], more: int = 0) -> Steps:
        """Return the sum of a list."""
        yield PAUSE_S
        return sum(numbers) + more

    @task()
    def told(self: Any, task_id: str) -> Steps:
        """Write down whose failure it was called for."""
        yield PAUSE_S
        words.logger.warning("told of %s", task_id)

    @task()
    def stubborn(self: Any, number: int, seconds: float) -> Steps:
        """Go on whatever is raised in it, for that long."""
        record_start(LEDGER, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                yield PAUSE_S
            except BaseException:
                continue
        record_done(LEDGER, number)

    @task()
    def kill(self: Any, number: int) -> Steps:
        """End the process that runs this, as a segmentation fault or the memory killer does."""
        record_start(LEDGER, number)
        yield PAUSE_S
        os.kill(os.getpid(), signal.SIGKILL)
        yield 60

    @task()
    def grow(self: Any, number: int, mebibytes: int) -> Steps:
        """Keep that much memory for the rest of the process's life; return the process."""
        record_start(LEDGER, number)
        yield PAUSE_S
        _kept.append(bytearray(b"x") * (mebibytes << 20))
        record_done(LEDGER, number)
        return os.getpid()

    @task()
    def fail(self: Any, number: int) -> Steps:
        """Raise."""
        yield PAUSE_S
        raise ValueError(f"number {number} is bad")

    @task(throws=(KeyError,), max_retries=2, default_retry_delay=0.01)
    def again(self: Any, number: int) -> Steps:
        """Retry until it may not."""
        record_start(LEDGER, number)
        yield PAUSE_S
        if self.request.retries < 2:
            raise self.retry(countdown=0, exc=KeyError(number))
        record_done(LEDGER, number)
        return self.request.retries

    @task(autoretry_for=(OSError,), retry_backoff=False, default_retry_delay=0, max_retries=2)
    def again_by_itself(self: Any, number: int, good_after: int) -> Steps:
        """Raise an error that is retried, so often."""
        record_start(LEDGER, number)
        yield PAUSE_S
        if self.request.retries < good_after:
            raise OSError(f"attempt {self.request.retries}")
        return self.request.retries

    @task()
    def rejects(self: Any, number: int) -> Steps:
        """Have the broker drop the message."""
        record_start(LEDGER, number)
        yield PAUSE_S
        raise words.reject("not wanted", requeue=False)

    @task()
    def ignores(self: Any, number: int) -> Steps:
        """Leave the state to whoever has set it."""
        yield PAUSE_S
        self.update_state(state="BY_HAND", meta={"number": number})
        yield PAUSE_S
        raise words.ignore()

    @task()
    def progresses(self: Any, number: int, gate: str) -> Steps:
        """Tell of its progress, and wait."""
        yield PAUSE_S
        self.update_state(state="PROGRESS", meta={"number": number})
        while not os.path.exists(gate):
            yield PAUSE_S
        return number

    @task()
    def sends(self: Any, number: int, count: int) -> Steps:
        """Send so many calls of ``work``, whose numbers are larger by ``SENT_BY_TASKS`` each; return their ids."""
        record_start(LEDGER, number)
        numbers = [number + SENT_BY_TASKS * index for index in range(1, count + 1)]
        results = [other(self, "work").delay(each) for each in numbers]
        yield PAUSE_S
        record_done(LEDGER, number)
        return [result.id for result in results]

    @task()
    def logs(self: Any, number: int, gate: str) -> Steps:
        """Write a line before and after a wait."""
        record_start(LEDGER, number)
        words.logger.warning("number %d is here", number)
        while not os.path.exists(gate):
            yield PAUSE_S
        words.logger.warning("number %d goes", number)
        record_done(LEDGER, number)

    @task()
    def large(self: Any, number: int, size: int) -> Steps:
        """Return that many characters."""
        yield PAUSE_S
        return str(number % 10) * size

    @task()
    def chatters(self: Any, number: int, count: int) -> Steps:
        """Set states as fast as it can, and write lines and send calls in between."""
        record_start(LEDGER, number)
        for index in range(count):
            self.update_state(state="PROGRESS", meta={"number": number, "index": index, "filling": "x" * 1000})
            if index % 10 == 0:
                other(self, "work").apply_async((number + SENT_BY_TASKS,), ignore_result=True)
                yield 0
        record_done(LEDGER, number)
        return number

    @task()
    def raises(self: Any, number: int, name: str) -> Steps:
        """Raise what is no Exception."""
        record_start(LEDGER, number)
        yield PAUSE_S
        raise {"SystemExit": SystemExit, "KeyboardInterrupt": KeyboardInterrupt, "Own": Own}[name](number)

    @task()
    def strange(self: Any, number: int, what: str) -> Steps:
        """Return or raise what is not easily told to others."""
        yield PAUSE_S
        if what == "error":
            raise Silent
        if what == "depth":
            return _deep(0)
        return {"object": object(), "generator": iter("x")}[what]

    @task(track_started=True)
    def tracked(self: Any, number: int, gate: str) -> Steps:
        """Wait, and be told of from the start."""
        while not os.path.exists(gate):
            yield PAUSE_S
        return number

    @task()
    def forks(self: Any, number: int) -> Steps:
        """Return what a process says that the standard library has forked, and what a pool of threads does."""
        yield PAUSE_S
        reader, writer = multiprocessing.get_context("fork").Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=writer.send, args=(number,))
        process.start()
        said = reader.recv()
        process.join(10)
        with ThreadPoolExecutor(2) as pool:
            sums = list(pool.map(sum, [(1, 2), (3, 4)]))
        yield PAUSE_S
        return [said, process.exitcode, sums]


class Own(BaseException):
    """What no task should raise."""


class Silent(Exception):
    """It cannot be shown, nor pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __str__(self) -> str:
        raise ValueError("it has no text")

    __repr__ = __str__


def _deep(depth: int) -> int:
    return _deep(depth + 1) + 1


def add_coroutines(app: Any, words: Words) -> None:
    """Give the application tasks that only a coroutine function can be, and one that stands beside them."""

    def task(function: Callable[..., Any]) -> Callable[..., Any]:
        app.task(name=function.__name__, bind=True)(function)
        return function

    @task
    async def loop_is(self: Any, number: int) -> str:
        """Return what kind of loop runs this."""
        return type(asyncio.get_running_loop()).__module__

    @task
    async def times_out(self: Any, number: int) -> str:
        """Wait for something too long, by each of the library's ways."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.sleep(60), 0.02)
        if sys.version_info >= (3, 11):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    await asyncio.sleep(60)
        return "timed out"

    @task
    async def groups(self: Any, number: int, seconds: float = 0.02) -> list[str]:
        """Return the ids that parts of this call, which run at a time, see as theirs."""
        seen = []

        async def part() -> None:
            await asyncio.sleep(seconds)
            seen.append(self.request.id)

        record_start(LEDGER, number)
        if sys.version_info >= (3, 11):
            async with asyncio.TaskGroup() as group:
                group.create_task(part())
                group.create_task(part())
        else:
            await asyncio.gather(part(), part())
        record_done(LEDGER, number)
        return seen

    @task
    async def group_fails(self: Any, number: int) -> None:
        """Have one part fail while another one runs."""

        async def bad() -> None:
            raise ValueError(f"number {number} is bad")

        await asyncio.gather(asyncio.sleep(60), bad())

    @task
    async def anyio_scopes(self: Any, number: int) -> list[str]:
        """Use a task group, a scope that is cancelled and a thread of anyio's."""
        import anyio
        import anyio.to_thread

        seen = []

        async def part(name: str) -> None:
            await anyio.sleep(0.01)
            seen.append(name)

        async with anyio.create_task_group() as group:
            group.start_soon(part, "first")
            group.start_soon(part, "second")
        with anyio.move_on_after(0.02) as scope:
            await anyio.sleep(60)
        if scope.cancelled_caught:
            seen.append("moved on")
        seen.append(await anyio.to_thread.run_sync(lambda: self.request.id))
        return seen

    @task
    async def fetches_by_httpx(self: Any, number: int, url: str) -> list[Any]:
        """Get pages at a time, and one that is too late."""
        import httpx

        async with httpx.AsyncClient(trust_env=False) as client:
            pages = await asyncio.gather(*(client.get(f"{url}/{page}") for page in range(3)))
            with contextlib.suppress(httpx.ReadTimeout):
                await client.get(f"{url}/late", timeout=0.1)
                raise AssertionError("it was not too late")
            return [self.request.id, *(page.text for page in pages)]

    @task
    async def fetches_by_aiohttp(self: Any, number: int, url: str) -> list[Any]:
        """Do the same with another library, which refuses to wait outside of a task of the loop's."""
        import aiohttp

        async with aiohttp.ClientSession() as session:

            async def get(page: object, seconds: float = 60) -> str:
                async with session.get(f"{url}/{page}", timeout=aiohttp.ClientTimeout(total=seconds)) as answer:
                    return await answer.text()

            pages = await asyncio.gather(*(get(page) for page in range(3)))
            with contextlib.suppress(asyncio.TimeoutError):
                await get("late", 0.1)
                raise AssertionError("it was not too late")
            return [self.request.id, *pages]

    @task
    async def queries_by_asyncpg(self: Any, number: int, url: str) -> list[Any]:
        """Query by a pool of connections, at a time; have one query take too long, and go on."""
        import asyncpg

        async with asyncpg.create_pool(url, min_size=1, max_size=2) as pool:
            found = await asyncio.gather(*(pool.fetchval("SELECT $1::int + 1", each) for each in range(4)))
            async with pool.acquire() as connection, connection.transaction():
                with contextlib.suppress(asyncio.TimeoutError):
                    async with connection.transaction():
                        await connection.execute("SELECT pg_sleep(60)", timeout=0.1)
                        raise AssertionError("it did not take too long")
                found.append(await connection.fetchval("SELECT 7"))
            return [self.request.id, *found]

    @task
    async def queries_by_sqlalchemy(self: Any, number: int, url: str) -> list[Any]:
        """Query in sessions, of which each task of the loop's has one."""
        from sqlalchemy import text
        from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker, create_async_engine

        engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"))
        sessions = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
        kept = []  # so that no other one has the same place in memory

        async def query(value: int) -> int:
            kept.append(sessions())
            try:
                await sessions.execute(text("CREATE TEMPORARY TABLE mine (value int) ON COMMIT DROP"))
                await sessions.execute(text("INSERT INTO mine VALUES (:value)"), {"value": value})
                found: int = (await sessions.execute(text("SELECT sum(value) FROM mine"))).scalar_one()
                assert kept.count(sessions()) == 1
                return found
            finally:
                await sessions.remove()

        found = [await query(0), *await asyncio.gather(*map(query, range(1, 4)))]
        await engine.dispose()
        return [self.request.id, len({*map(id, kept)}), *found]

    @task
    async def cancels_itself(self: Any, number: int, how: str) -> None:
        """End as a call that was cancelled, though nobody has asked for that."""
        await asyncio.sleep(PAUSE_S)
        if how == "raise":
            raise asyncio.CancelledError("by the task itself")
        running = asyncio.current_task()
        assert running is not None
        running.cancel("by the task itself")
        await asyncio.sleep(60)

    @task
    async def calls_another(self: Any, number: int) -> list[Any]:
        """Await another task directly, and be this one again afterwards."""
        before = self.request.id
        value = await app.tasks["groups"](number)
        return [value, before == self.request.id, words.current_task().name]

    @task
    async def exits(self: Any, number: int) -> None:
        """Raise what ends an interpreter."""
        await asyncio.sleep(PAUSE_S)
        raise SystemExit(3)

    @task
    async def leaves_a_task(self: Any, number: int) -> int:
        """Return while something that it has started runs on, and fails."""

        async def fails_later() -> None:
            await asyncio.sleep(PAUSE_S)
            raise ValueError("nobody waits for this")

        _tasks.append(asyncio.create_task(fails_later()))
        return number

    @task
    def plain_beside(self: Any, number: int, seconds: float) -> list[Any]:
        """Block a thread, in a task that is no coroutine function."""
        record_start(LEDGER, number)
        time.sleep(seconds)
        record_done(LEDGER, number)
        return [self.request.id, words.current_task().name]

    @task
    def spins(self: Any, number: int, seconds: float) -> list[Any]:
        """Take processor time and never give way, but for what the interpreter does."""
        record_start(LEDGER, number)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass
        record_done(LEDGER, number)
        return [self.request.id]


class AwaitedHandlers:
    """Handlers that are coroutine functions: each tells, after a wait, of its call, and of the loop that it runs on."""

    name: str
    request: Any

    async def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Tell of the begin."""
        await self._tell("before_start", task_id)

    async def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        """Tell of the value."""
        await self._tell(f"on_success {retval}", task_id)

    async def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Tell of the error."""
        await self._tell(f"on_failure {exc}", task_id)

    async def on_retry(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Tell of the reason."""
        await self._tell(f"on_retry {exc}", task_id)

    async def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Tell of the state."""
        await self._tell(f"after_return {status}", task_id)

    async def _tell(self, what: str, task_id: str) -> None:
        await asyncio.sleep(PAUSE_S)
        assert self.request.id == task_id
        loop = type(asyncio.get_running_loop()).__module__
        logging.getLogger(__name__).warning("%s of %s on %s", what, task_id, loop)


def add_handled(app: Any, base: Any, suffix: str = "", **options: Any) -> None:
    """Give the application a task of that class, in both ways; it returns its number, fails or retries once."""

    def handled(self: Any, number: int, end: str) -> Steps:
        yield PAUSE_S
        if end == "fails":
            raise ValueError(f"number {number} is bad")
        if end == "retries" and not self.request.retries:
            raise self.retry(countdown=0, exc=ValueError(f"number {number} again"))
        return number

    options.update(base=base, bind=True)
    app.task(name=f"handled{suffix}", **options)(sleeping(handled))
    app.task(name=f"handled{suffix}_async", **options)(awaiting(handled))


_tasks: list[asyncio.Task[None]] = []


def _pieces(seconds: float) -> Generator[float, None, None]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield PAUSE_S
