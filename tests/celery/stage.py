"""A broker, a result store, a Celery client and workers of one Celery application, started by Celery or by fastq.

The test talks to both kinds of worker through stock Celery alone. Everything is new per stage: the virtual host or
the Redis database, the result file, the journal.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import subprocess
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import celery
import pytest
from celery.result import AsyncResult
from redis import Redis as RedisClient

from tests.celery.proj.app import TASK_MODULES, make_app
from tests.support.celery_client import close_client
from tests.support.servers import RabbitMQ, Redis, wait_until
from tests.support.task_ledger import Ledger
from tests.support.worker_process import Program, WorkerProcess

BrokerKind = Literal["amqp", "redis"]
BackendKind = Literal["rpc", "redis", "database", "disabled"]

APP = "tests.celery.proj"
QUEUE = "celery"
TIMEOUT_S = 20.0  # for one result; a loaded machine with two cores takes seconds for what needs milliseconds
# Nobody to talk to, so a worker need not wait a second for answers.
ALONE = ("--without-gossip", "--without-mingle")


@dataclass(frozen=True)
class Servers:
    """Where a stage gets its broker and its stores from; each server is started when the first stage asks for it."""

    rabbitmq: Callable[[], RabbitMQ]
    redis: Callable[[], Redis]


@dataclass
class Tasks:
    """The client's tasks by the last part of their name."""

    client: celery.Celery

    def __getattr__(self, name: str) -> Any:
        for module in TASK_MODULES:
            task = self.client.tasks.get(f"{module}.{name}")
            if task is not None:
                return task
        raise AttributeError(name)


@dataclass
class CeleryStage:
    """See the module. ``runner`` is what `start_worker` starts unless it is told otherwise."""

    servers: Servers
    runner: Program
    broker: BrokerKind
    backend: BackendKind
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    workers: list[WorkerProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._closing = contextlib.ExitStack()
        self.database = -1
        self.vhost = ""
        self.rabbitmq: RabbitMQ | None = None
        self.broker_url = self._open_rabbitmq() if self.broker == "amqp" else self._redis_url()
        self.settings = {"broker_url": self.broker_url, "result_backend": self._backend_url(), **self.settings}
        self.settings.setdefault("broker_connection_retry_on_startup", True)
        self.journal_file = self.folder / "journal.jsonl"
        self.ledger = Ledger(self.folder / "ledger.bin")
        self._closing.callback(celery.current_app._get_current_object().set_current)
        self.client = make_app(self.settings, set_as_current=False)
        self.client.set_current()
        for module in TASK_MODULES:
            self.client.loader.import_task_module(module)
        self.client.finalize()
        self.tasks = Tasks(self.client)
        self._closing.callback(close_client, self.client)

    def close(self) -> None:
        """Kill what still runs, close the client's connections, remove what the servers keep."""
        for worker in self.workers:
            worker.kill9()
        self._closing.close()

    # -- workers

    def start_worker(
        self,
        *arguments: str,
        app: str = APP,
        runner: Program | None = None,
        settings: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        extras: tuple[str, ...] | None = None,
        log_level: str = "INFO",
        await_ready: bool = True,
        alone: bool = True,
        stdin: int = subprocess.DEVNULL,
    ) -> WorkerProcess:
        """Return a worker that is ready, with two children unless `-c` says otherwise."""
        folder = self.folder / f"worker{len(self.workers) + 1}"
        folder.mkdir()
        arguments = arguments if "-c" in arguments else ("-c", "2", *arguments)
        worker = WorkerProcess(
            folder,
            *arguments,
            *(ALONE if alone else ()),
            app=app,
            env={**self.environment(settings, extras), **(env or {})},
            log_level=log_level,
            await_ready=await_ready,
            program=runner or self.runner,
            stdin=stdin,
        )
        self.workers.append(worker)
        return worker.start()

    def environment(
        self, settings: dict[str, Any] | None = None, extras: tuple[str, ...] | None = None
    ) -> dict[str, str]:
        """Return what configures the application in a worker."""
        return {
            "PROJ_SETTINGS": json.dumps({**self.settings, **(settings or {})}),
            "PROJ_JOURNAL": str(self.journal_file),
            "PROJ_LEDGER": str(self.ledger.path),
            "PROJ_EXTRAS": ",".join(self.extras if extras is None else extras),
            "C_FORCE_ROOT": "1",  # Celery refuses pickle as root without it
        }

    @property
    def worker(self) -> WorkerProcess:
        """The worker started last."""
        return self.workers[-1]

    # -- messages and results

    def send(self, name: str, *args: Any, **options: Any) -> AsyncResult:
        """Send a call by name, without looking at the task's signature."""
        return self.client.send_task(f"{TASK_MODULES[0]}.{name}", args, **options)

    def get(self, result: AsyncResult, timeout_s: float = TIMEOUT_S, **options: Any) -> Any:
        """Return the value; raise the task's error, or TimeoutError with the worker's log."""
        try:
            return result.get(timeout=timeout_s, **options)
        except celery.exceptions.TimeoutError as error:
            raise TimeoutError(f"no result of {result.id} after {timeout_s} s\n{self.logs()}") from error

    def error(self, result: AsyncResult, timeout_s: float = TIMEOUT_S) -> BaseException:
        """Return the error with which the call ended; fail when it ended well."""
        value = self.get(result, timeout_s, propagate=False)
        assert isinstance(value, BaseException), f"{result.id} returned {value!r}"
        return value

    def wait_for_state(self, result: AsyncResult, state: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Return what the store says about the call when it is in this state.

        Redis and rpc:// announce states: the client subscribes before it sends, so that none is missed.
        """
        found: list[dict[str, Any]] = []

        def look(meta: dict[str, Any]) -> None:
            if meta["task_id"] == result.id and meta["status"] == state:
                found.append(meta)
                raise _StateSeen

        with contextlib.suppress(_StateSeen):
            self.get(result, timeout_s, on_message=look, propagate=False)
        assert found, f"{result.id} ended as {result.state} without having been {state}"
        return found[0]

    # -- the journal

    def notes(self, what: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """Return the notes with this name and these fields, in the order in which they were written."""
        text = self.journal_file.read_text(encoding="utf-8") if self.journal_file.exists() else ""
        entries = [json.loads(line) for line in text.splitlines()]
        return [
            entry
            for entry in entries
            if (what is None or entry["what"] == what) and all(entry.get(key) == value for key, value in fields.items())
        ]

    def wait_for_notes(
        self, what: str, count: int = 1, timeout_s: float = TIMEOUT_S, **fields: Any
    ) -> list[dict[str, Any]]:
        """Return the notes when there are that many."""
        self.until(
            lambda: len(self.notes(what, **fields)) >= count,
            f"{count} notes {what!r} {fields}",
            timeout_s,
        )
        return self.notes(what, **fields)

    def gate(self) -> Path:
        """Return the path of a file for which tasks can wait; `touch()` opens it."""
        return self.folder / f"gate-{uuid.uuid4().hex[:8]}"

    # -- the broker, behind everybody's back

    def depth(self, queue: str = QUEUE) -> int:
        """Return how many messages the queue holds, ready or in somebody's hands; -1 when there is no such queue."""
        if self.rabbitmq is not None:
            return self.rabbitmq.queue_depth(self.vhost, queue)
        with self.redis() as redis, redis.pipeline() as together:
            for name in _lists_of(queue):
                together.llen(name)
            return int(sum(together.hlen("unacked").execute()))

    def held_bodies(self, queue: str = QUEUE) -> list[list[Any]]:
        """Return the bodies (args, kwargs, embed) of the JSON messages in Redis, ready or in somebody's hands."""
        with self.redis() as redis, redis.pipeline() as together:
            for name in _lists_of(queue):
                together.lrange(name, 0, -1)
            *waiting, unacked = together.hvals("unacked").execute()
        envelopes = [json.loads(each) for each in itertools.chain(*waiting)]
        envelopes += [json.loads(each)[0] for each in unacked]
        return [json.loads(base64.b64decode(each["body"])) for each in envelopes]

    def wait_for_empty(self, queue: str = QUEUE, timeout_s: float = TIMEOUT_S) -> None:
        """Return when every message of the queue has been settled."""
        self.until(lambda: self.depth(queue) <= 0, f"no message in {queue}", timeout_s)

    def take(self, queue: str, count: int = 1, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Take messages (kombu's objects) from a queue that no worker consumes."""
        found: list[Any] = []
        with self.client.connection_for_read() as connection:
            buffer = connection.SimpleQueue(queue)
            try:
                for _ in range(count):
                    message = buffer.get(timeout=timeout_s)
                    message.ack()
                    found.append(message)
            finally:
                buffer.close()
        return found

    @contextlib.contextmanager
    def redis(self) -> Iterator[RedisClient]:
        """A connection to the stage's database."""
        client = RedisClient(port=self.servers.redis().port, db=self.database)
        try:
            yield client
        finally:
            client.close()

    # -- waiting

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
        """Return when the condition holds; otherwise fail with the workers' logs."""
        wait_until(condition, timeout_s, lambda: TimeoutError(f"{what}: not so after {timeout_s} s\n{self.logs()}"))

    def logs(self) -> str:
        """Return the end of every worker's log."""
        return "\n".join(f"--- {worker.log_file}\n{worker.log()[-5000:]}" for worker in self.workers)

    # -- inside

    def _open_rabbitmq(self) -> str:
        self.rabbitmq = rabbitmq = self.servers.rabbitmq()
        self.vhost = rabbitmq.new_vhost()
        self._closing.callback(rabbitmq.delete_vhost, self.vhost)
        return rabbitmq.url(self.vhost)

    def _redis_url(self) -> str:
        redis = self.servers.redis()
        if self.database < 0:
            self.database = _databases.take()
            self._closing.callback(_databases.give_back, self.database)
            self._closing.callback(self._flush)
        return redis.url(self.database)

    def _flush(self) -> None:
        with self.redis() as redis:
            redis.flushdb()

    def _backend_url(self) -> str:
        if self.backend == "redis":
            return self._redis_url()
        return {
            "rpc": "rpc://",
            "database": f"db+sqlite:///{self.folder / 'results.db'}",
            "disabled": "disabled://",
        }[self.backend]


class _StateSeen(Exception):
    """Ends the waiting for a result at an earlier state."""


class _Databases:
    """The numbered databases of the session's Redis that no stage uses."""

    def __init__(self) -> None:
        self._free = list(range(15, 0, -1))

    def take(self) -> int:
        return self._free.pop()

    def give_back(self, number: int) -> None:
        self._free.append(number)


_databases = _Databases()


@contextlib.contextmanager
def opened(
    servers: Servers,
    folders: pytest.TempPathFactory,
    runner: Program,
    broker: BrokerKind,
    backend: BackendKind,
    *,
    extras: tuple[str, ...] = (),
    **settings: Any,
) -> Iterator[CeleryStage]:
    """A stage without workers; its application is the current one until it is closed."""
    stage = CeleryStage(servers, runner, broker, backend, folders.mktemp(f"{runner}-{broker}"), settings, extras)
    try:
        yield stage
    finally:
        stage.close()


def _lists_of(queue: str) -> list[str]:
    """Return the keys of the lists that kombu keeps a queue in: one for each step of priority."""
    return [queue, *(f"{queue}\x06\x16{step}" for step in (3, 6, 9))]


def counts(notes: list[dict[str, Any]], key: str) -> Counter[Any]:
    """Return how often each value of a field occurs."""
    return Counter(note[key] for note in notes)


def is_alive(pid: int) -> bool:
    """Return whether a process of this number runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
