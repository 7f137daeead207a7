"""A message loop with real children and a broker made of lists: for tests of the core, the pool and the pipe.

The tasks are plain functions of this file's ``TASKS``; no application, no codec beyond JSON.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvloop

from fastq._child import Child, TaskRules
from fastq._core import Core
from fastq.link import BatchSource, Delivery
from fastq.plugins import load
from fastq.pool import PREFORK, ChildMain, PoolKind, PoolOptions
from fastq.pool.supervisor import Pool
from fastq.running.birth import write_stacks_to
from fastq.wire.ids import new_id
from fastq.wire.message import Message, encode_task
from fastq.wire.pipe import ChildPipe


def stuck_in_c(seconds: float) -> None:
    """Hold the interpreter lock in C, so that no Python signal handler runs."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def nap() -> int:
    """Take as long on any machine, and short. Returns who it was.

    Without sleeping: on a busy machine the end of a sleep comes milliseconds late, and the call is no short one.
    """
    until = time.perf_counter() + 20e-6
    while time.perf_counter() < until:
        pass
    return os.getpid()


TASKS: dict[str, Callable[..., Any]] = {
    "noop": lambda *args: None,
    "sleep": time.sleep,
    "leave": sys.exit,
    "die": lambda code=3: os._exit(code),
    "stuck": stuck_in_c,
    "pid": os.getpid,
    "nap": nap,
}


def child_main(sock: int, shared: int, slot: int, group: int = 0) -> int:
    pipe = ChildPipe(sock, shared)
    pipe.ready()
    while (call := pipe.next()) is not None:
        args, kwargs, _ = json.loads(call.body)
        if call.name == "publish":
            pipe.publish(Message("", "other", call.props, call.body, "follow-up"))
            value = None
        elif call.name == "state":
            pipe.state(call.id, "PROGRESS", b'{"n":1}')
            value = None
        elif call.name == "large":
            value = "x" * args[0]
        else:
            value = TASKS[call.name](*args, **kwargs)
        pipe.finish(call, 0, json.dumps(value).encode() if call.wants_result else None)
    return 155


def child_with_stacks(sock: int, shared: int, slot: int, group: int = 0) -> int:
    """Run calls in a process that says where it is when it is asked."""
    write_stacks_to(shared)
    return child_main(sock, shared, slot)


def main_of(place: str) -> ChildMain:
    """Return what a spawned child runs, by its ``module:name``."""
    found: ChildMain = load(place)
    return found


class ListBroker(BatchSource):
    """Deliveries out of a list; keeps what it is told."""

    def __init__(self, loop: asyncio.AbstractEventLoop, window: int = 100) -> None:
        super().__init__()
        self.loop = loop
        self.window = window
        self.queue: list[tuple[int, bytes, bytes, bytes, int]] = []
        self.room = 0
        self.given: dict[int, str] = {}
        self.settled: list[tuple[int, int]] = []
        self.saved: list[tuple[str, str, bytes, str]] = []
        self.sent: list[Message] = []
        self.changed = asyncio.Event()
        self.confirms = True

    def put(
        self, task: str, *args: Any, headers: dict[str, Any] | None = None, deliveries: int = 1, **options: Any
    ) -> int:
        """Queue a task message and return its tag."""
        message = encode_task(task, new_id(), json.dumps([args, {}, {}]).encode(), headers=headers, **options)
        return self.put_raw(message.props, message.body, deliveries)

    def put_raw(self, props: bytes, body: bytes, deliveries: int = 1) -> int:
        tag = len(self.given) + 1
        self.given[tag] = ""
        self.queue.append((tag, b"celery", props, body, deliveries))
        self._give()
        return tag

    def pull(self, n: int) -> None:
        self.room = n
        self.loop.call_soon(self._give)

    def _give(self) -> None:
        rows, self.queue = self.queue[: self.room], self.queue[self.room :]
        self.room -= len(rows)
        if rows:
            self.loop.call_soon(self.receive, rows)

    def settle(self, batch: list[tuple[int, int]]) -> None:
        self.settled += batch
        self.changed.set()

    def save(self, batch: list[tuple[str, str, bytes, str, int]]) -> None:
        self.saved += [each[:4] for each in batch]
        self.changed.set()

    def publish(self, batch: list[tuple[int, Message]]) -> None:
        self.sent += [message for _, message in batch]
        if self.confirms:
            self.loop.call_soon(self.published, [token for token, _ in batch])
        else:
            self.loop.call_soon(self.publish_failed, [token for token, _ in batch], "full")
        self.changed.set()

    def verdict(self, tag: int) -> int | None:
        return dict(self.settled).get(tag)

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10) -> None:
        """Return when the condition holds; look again after each thing that this broker is told."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), max(0.01, deadline - time.monotonic()))


class RecordingHooks:
    """Answers the core as a worker would, and remembers what it was asked."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.pool: Pool
        self.events: list[tuple[Any, ...]] = []
        self.lost: list[tuple[str, str]] = []
        self.converted: tuple[bytes, bytes] | None = None
        self.records_elsewhere = False
        self.unrecorded: list[Delivery] = []
        self.keeps = False
        self.kept: list[Delivery] = []

    def received(self, name: str, task_id: str, delivery: Delivery) -> bool:
        self.events.append(("received", name))
        if self.keeps:
            self.kept.append(delivery)
        return self.keeps

    def started(self, task_id: str, pid: int) -> None:
        self.events.append(("started", task_id))

    def handed(self, delivery: Delivery) -> None:
        self.events.append(("handed",))

    def accepted(self, delivery: Delivery, pid: int) -> None:
        self.events.append(("accepted", pid))

    def reported(self, delivery: Delivery, state: str, report: bytes | None) -> None:
        self.events.append(("reported", state, report))

    def unaddressed(self, task_id: str, meta: bytes, delivery: Delivery) -> None:
        self.events.append(("unaddressed", task_id, meta))

    def finished(self, name: str, task_id: str, state: str, report: str | None, runtime_s: float) -> None:
        self.events.append(("finished", name, state, report))

    def foreign(self, props: bytes, body: bytes) -> tuple[bytes, bytes] | None:
        self.events.append(("foreign", body))
        return self.converted

    def refused(self, reason: str, queue: bytes, props: bytes, body: bytes) -> None:
        self.events.append(("refused", reason))

    def failure(
        self, kind: str, name: str, task_id: str, detail: Any, delivery: Delivery
    ) -> tuple[str, bytes | None] | None:
        self.events.append(("failure", kind, name, detail))
        if self.records_elsewhere:
            self.unrecorded.append(delivery)
            return None
        return "FAILURE", b"{}"

    def unsendable(self, task_id: str, queue: str, reason: str) -> None:
        self.events.append(("unsendable", queue, reason))

    def unconfirmed(self, name: str, task_id: str) -> None:
        self.events.append(("unconfirmed", name))

    def cancelled(self, name: str, task_id: str, delivery: Delivery) -> None:
        self.events.append(("cancelled", task_id))

    def result_lost(self, name: str, task_id: str) -> None:
        self.events.append(("result_lost", task_id))

    def hard_limit(self, child: Child, name: str, task_id: str, limit: float) -> None:
        self.events.append(("hard_limit", name, limit))
        self.pool.kill_child(child)

    def overdue(self, child: Child, name: str, task_id: str, limit: float) -> None:
        self.events.append(("overdue", name, limit))

    def hopeless(self, child: Child, why: str) -> None:
        self.events.append(("hopeless", why))
        self.pool.kill_child(child)

    def stalled(self, child: Child, seconds: float) -> None:
        self.events.append(("stalled",))

    def terminate(self, child: Child, signum: int) -> None:
        self.events.append(("terminate", signum))
        self.pool.terminate(child, signum)


class Running:
    """What a test works with."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, core: Core, pool: Pool, broker: ListBroker, hooks: RecordingHooks
    ) -> None:
        self.loop, self.core, self.pool, self.broker, self.hooks = loop, core, pool, broker, hooks


def run_loop(
    body: Callable[[Running], Coroutine[Any, Any, None]],
    *,
    concurrency: int = 1,
    window: int = 100,
    tasks: dict[str, dict[str, Any]] | None = None,
    timeout_s: float = 30,
    keeps_spare: bool = False,
    main_of_child: ChildMain = child_main,
    kind: PoolKind = PREFORK,
    pool_options: dict[str, Any] | None = None,
    **core_options: Any,
) -> None:
    """Start a pool and a loop, run the test's coroutine, and take everything down."""
    assert kind.prepare is not None
    prepared = load(kind.prepare)(main_of_child)
    loop = uvloop.new_event_loop()

    async def main() -> None:
        hooks = RecordingHooks(loop)
        names = [*TASKS, "publish", "state", "large"]
        options = [TaskRules(name, **(tasks or {}).get(name, {})) for name in names]
        wanted = PoolOptions(
            concurrency,
            lambda title, reason: hooks.lost.append((title, reason)),
            lambda error: hooks.events.append(("fatal", str(error))),
            keeps_spare,
            **(pool_options or {}),
        )
        pool = hooks.pool = load(kind.pool)(loop, prepared, wanted)
        core = Core(loop, options, hooks, pool, **core_options)
        await pool.start(core)
        broker = ListBroker(loop, window)
        core.set_store(broker)
        core.add_source(broker)
        core.set_outlet(broker)
        try:
            await body(Running(loop, core, pool, broker, hooks))
        finally:
            await pool.stop(1)
            pool.close()

    def run() -> None:
        try:
            loop.run_until_complete(asyncio.wait_for(main(), timeout_s))
        finally:
            loop.close()

    if not kind.runs_here:
        run()
        return
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(run)
        running.add_done_callback(lambda _: prepared.close())
        prepared.serve()
    running.result()
