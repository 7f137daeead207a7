"""Both ends of events without a worker: a herald that sends them as a worker would, and Celery's receiver beside it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

import celery
import uvloop
from celery.events import EventReceiver

from fastq.brokers import open_bus
from fastq.interfaces import Bus
from fastq.settings import Settings
from fastq.worker.remote.clock import LamportClock
from fastq.worker.remote.events import Events
from tests.support.servers import wait_until

T = TypeVar("T")
Event = dict[str, Any]
TIMEOUT_S = 20.0
READY = "capture-ready"


class Herald:
    """A connection of the worker's kind with events on it, on a loop in a thread of its own."""

    def __init__(self, url: str, hostname: str = "fastq@herald", **options: Any) -> None:
        self.hostname = hostname
        self.clock = LamportClock()
        self.bus: Bus
        self.events: Events
        self._settings = Settings({"broker_url": url, "worker_send_task_events": True})
        self._url = url
        self._options = options
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="herald")

    def __enter__(self) -> Herald:
        self._thread.start()
        try:
            self.wait(self._open())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        try:
            self.wait(self._close())
        finally:
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT_S)
        self._loop.close()

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and return what it returns."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(TIMEOUT_S)

    def do(self, action: Callable[[Events], object]) -> None:
        """Do something with the events on the loop, and send what is collected."""

        async def act() -> None:
            action(self.events)
            self.events.flush()

        self.wait(act())

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        self.bus = open_bus(self._url, self._settings, self.clock)
        await self.bus.open(self.hostname, lambda headers, body: None)
        self.events = Events(loop, lambda: self.bus, self.hostname, self._settings, self.clock, **self._options)
        self.events.connected()

    async def _close(self) -> None:
        self.events.stop()
        await self.bus.close()


class Capture:
    """Celery's own EventReceiver in a thread: collects events, and has Celery's State digest them."""

    def __init__(self, client: celery.Celery) -> None:
        self.events: list[Event] = []
        self.state = client.events.State()
        self._client = client
        self._ready = threading.Event()
        self._receiver: EventReceiver
        self._thread = threading.Thread(target=self._run, name="capture")

    def __enter__(self) -> Capture:
        self._thread.start()
        # With Redis a receiver says that it listens before it does.
        with self._client.events.default_dispatcher() as dispatcher:
            deadline = time.monotonic() + TIMEOUT_S
            while not self._ready.wait(0.05):
                assert time.monotonic() < deadline, "the receiver did not start"
                dispatcher.send(READY)
        return self

    def __exit__(self, *error: object) -> None:
        self._receiver.should_stop = True
        self._thread.join(TIMEOUT_S)

    def of(self, kind: str, hostname: str | None = None) -> list[Event]:
        """Return the events of a type until now."""
        return [each for each in list(self.events) if each["type"] == kind and hostname in (None, each["hostname"])]

    def until(self, kind: str, count: int = 1, hostname: str | None = None) -> list[Event]:
        """Return the events of a type when there are that many."""
        wait_until(
            lambda: len(self.of(kind, hostname)) >= count,
            TIMEOUT_S,
            lambda: TimeoutError(f"not {count} x {kind}; got {[each['type'] for each in self.events]}"),
        )
        return self.of(kind, hostname)

    def _run(self) -> None:
        with self._client.connection_for_read() as connection:
            self._receiver = EventReceiver(connection, handlers={"*": self._on_event}, app=self._client)
            self._receiver.capture(wakeup=False)

    def _on_event(self, event: Event) -> None:
        if event["type"] == READY:
            self._ready.set()
            return
        self.events.append(dict(event))
        self.state.event(event)
