"""One broker, one ledger, and the workers and clients of a test around them: the same words for each broker.

Tasks are those of ``support.tasks_for_faults``, each with a number. What was confirmed by the broker is in ``sent``.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import pytest

from fastq import AsyncResult, FastQ
from fastq.brokers.rabbitmq.connection import BlockingConnection, connect_any
from fastq.brokers.rabbitmq.handshake import frame
from fastq.brokers.rabbitmq.url import Endpoints
from fastq.brokers.redis.blocking import BlockingRedis
from fastq.brokers.redis.url import parse_redis_url
from fastq.settings import Settings
from fastq.wire.amqp import METHODS, decode_properties
from fastq.wire.ids import new_id
from fastq.wire.kombu import decode_envelope
from fastq.wire.message import Message, encode_task
from tests.support.servers import RabbitMQ, Redis, wait_until
from tests.support.task_ledger import Ledger, Verdict
from tests.support.worker_process import WorkerProcess

Kind = Literal["amqp", "quorum", "redis", "sqlite"]

QUEUE = "celery"
DEAD = "dead"
APP = "tests.support.tasks_for_faults"


class Stage:
    """See the module. ``url`` may lead workers through a proxy; the test itself talks to the broker directly."""

    def __init__(self, kind: Kind, url: str, folder: Path, rabbitmq: RabbitMQ | None = None, **settings: Any) -> None:
        self.kind = kind
        self.url = url
        self.folder = folder
        self.rabbitmq = rabbitmq
        self.ledger = Ledger(folder / "ledger.bin")
        self.sent: list[int] = []
        self.settings = {**({"task_default_queue_type": "quorum"} if kind == "quorum" else {}), **settings}
        self.workers: list[WorkerProcess] = []
        self.client = FastQ("client", broker=url, backend=self.backend, **self.settings)
        self.redis = BlockingRedis(parse_redis_url(url, self.client.conf), 5.0, "test") if kind == "redis" else None
        if rabbitmq is not None:
            self._dead_letter_policy(rabbitmq)
        self.client.publisher.declare(QUEUE)

    @property
    def backend(self) -> str:
        return self.url if self.kind in ("redis", "sqlite") else "rpc://"

    def close(self) -> None:
        """Kill what still runs and close the client's connections."""
        for worker in self.workers:
            worker.kill9()
        self.client.close()
        if self.redis is not None:
            self.redis.close()

    # -- workers

    def environment(self, url: str | None = None, **settings: Any) -> dict[str, str]:
        """Return what configures the application in a worker."""
        return {
            "FASTQ_BROKER_URL": url or self.url,
            "FASTQ_RESULT_BACKEND": settings.pop("result_backend", self.backend),
            "FASTQ_TEST_SETTINGS": json.dumps({**self.settings, **settings}),
            "FASTQ_TEST_LEDGER": str(self.ledger.path),
        }

    def start_worker(
        self, *arguments: str, url: str | None = None, await_ready: bool = True, app: str = APP, **settings: Any
    ) -> WorkerProcess:
        """Return a worker that is ready; ``url`` is its own way to the broker, ``app`` another application."""
        folder = self.folder / f"worker{len(self.workers) + 1}"
        folder.mkdir()
        worker = WorkerProcess(
            folder,
            *arguments,
            app=app,
            env=self.environment(url, **settings),
            await_ready=await_ready,
        )
        self.workers.append(worker)
        return worker.start()

    # -- messages

    def send(self, count: int, task: str = "work", *args: Any, **options: Any) -> list[int]:
        """Publish numbered calls without results, with one wait for all confirms, and return their numbers."""
        numbers = list(range(len(self.sent), len(self.sent) + count))
        messages = [
            encode_task(task, new_id(), json.dumps([[number, *args], {}, {}]).encode(), ignore_result=True, **options)
            for number in numbers
        ]
        self.publish(messages)
        self.sent += numbers
        return numbers

    def publish(self, messages: list[Message]) -> None:
        """Publish as is."""
        self.client.publisher.publish(messages)

    def call(self, task: str, *args: Any, **options: Any) -> AsyncResult[Any]:
        """Send one numbered call whose result is wanted; its number is the last of ``sent``."""
        self.sent.append(len(self.sent))
        return self.client.send_task(task, (self.sent[-1], *args), **options)

    def depth(self) -> int:
        """Return how many messages the queue holds, whoever has them at the moment."""
        if self.rabbitmq is not None:
            return self.rabbitmq.queue_depth(self.vhost, QUEUE)
        if self.redis is not None:
            self.redis.close()  # its server may be another one by now
            return sum(self.redis.pipeline([("LLEN", QUEUE), ("ZCARD", f"{QUEUE}.delayed"), ("HLEN", "unacked")]))
        with self._database() as database:
            return int(database.execute("SELECT count(*) FROM messages").fetchone()[0])

    def dead_letters(self, count: int = 1, timeout_s: float = 5.0) -> list[tuple[bytes, bytes]]:
        """Take (properties, body) of what is in the dead letters, once that many are there."""
        found: list[tuple[bytes, bytes]] = []
        take = {"redis": self._take_dead_envelopes, "sqlite": self._take_dead_rows}.get(
            self.kind, self._take_dead_messages
        )

        def enough() -> bool:
            found.extend(take())
            return len(found) >= count

        until(enough, timeout_s, f"{count} dead letters")
        return found

    def dead_reasons(self) -> list[str]:
        """Return why the dead letters are there, where the broker has a place for that; not for long on RabbitMQ."""
        if self.redis is not None:
            found = self.redis.call("LRANGE", f"{QUEUE}.dead", 0, -1)
            return [json.loads(raw)["headers"]["x-rejected"] for raw in found]
        if self.rabbitmq is not None:
            found = [decode_properties(props)["headers"] for props, _ in self._take_dead_messages()]
            return [headers["x-rejected"] for headers in found]
        with self._database() as database:
            return [reason for (reason,) in database.execute("SELECT reason FROM dead")]

    # -- what became of it

    def wait_for(self, numbers: Iterable[int], timeout_s: float) -> None:
        """Return when all these tasks have reached their end."""
        wanted = set(numbers)
        wait_until(
            lambda: wanted <= self.ledger.done().keys(),
            timeout_s,
            lambda: TimeoutError(
                f"{len(wanted - self.ledger.done().keys())} of {len(wanted)} tasks not done after {timeout_s} s\n"
                + "\n".join(f"--- {worker.log_file}\n{worker.log()[-4000:]}" for worker in self.workers)
            ),
        )

    def wait_for_settled(self, timeout_s: float = 5.0) -> None:
        """Return when the broker holds nothing more of the queue."""
        wait_until(
            lambda: self.depth() == 0,
            timeout_s,
            lambda: TimeoutError(f"{self.depth()} messages are still in the queue after {timeout_s} s"),
        )

    def verdict(self, what: str) -> Verdict:
        """Print and return the counts."""
        verdict = self.ledger.check(self.sent)
        print(f"{what} [{self.kind}]: {verdict}")
        return verdict

    # -- inside

    @property
    def vhost(self) -> str:
        return self.url.rpartition("/")[2].replace("%2F", "/")

    def _dead_letter_policy(self, rabbitmq: RabbitMQ) -> None:
        # A policy, as RabbitMQ's own advice is: the worker declares its queue without knowing of it.
        options = f'[{{<<"dead-letter-exchange">>, <<"">>}}, {{<<"dead-letter-routing-key">>, <<"{DEAD}">>}}]'
        rabbitmq.evaluate(
            f'rabbit_policy:set(<<"{self.vhost}">>, <<"dlx">>, <<"^{QUEUE}$">>, {options}, 0, <<"queues">>, <<"test">>)'
        )
        self.client.publisher.declare(DEAD)

    def _take_dead_messages(self) -> list[tuple[bytes, bytes]]:
        settings = self.client.conf
        connection = connect_any(Endpoints(self.url, settings), settings, "test", 5.0)
        try:
            connection.open_channel(1)
            return list(iter(lambda: _get(connection), None))
        finally:
            connection.close()

    def _take_dead_envelopes(self) -> list[tuple[bytes, bytes]]:
        assert self.redis is not None
        return [decode_envelope(raw)[:2] for raw in self.redis.call("RPOP", f"{QUEUE}.dead", 100_000) or ()]

    def _take_dead_rows(self) -> list[tuple[bytes, bytes]]:
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")  # nothing is added between the two
            rows: list[tuple[bytes, bytes]] = database.execute("SELECT props, body FROM dead ORDER BY id").fetchall()
            database.execute("DELETE FROM dead")
            database.commit()
        return rows

    def _database(self) -> _Database:
        return _Database(self.url.removeprefix("sqlite:///"))


class _Database:
    """A connection that closes at the end of its block; sqlite3's own only ends the transaction."""

    def __init__(self, path: str) -> None:
        self._connection = sqlite3.connect(path, timeout=5.0)

    def __enter__(self) -> sqlite3.Connection:
        return self._connection

    def __exit__(self, *error: object) -> None:
        self._connection.close()


def _get(connection: BlockingConnection) -> tuple[bytes, bytes] | None:
    """Take one message; None when the queue is empty."""
    connection.transmit(frame("basic.get", 1, queue=DEAD, no_ack=True))
    event = connection.next_event(time.monotonic() + 5.0)
    assert event is not None, "the broker did not answer basic.get"
    return (event.props, event.body) if event.method_id == METHODS["basic.get-ok"] else None


def open_stage(kind: Kind, request: pytest.FixtureRequest, folder: Path, **settings: Any) -> Stage:
    """Return a stage on the session's RabbitMQ or Redis, in a place of its own, or on a new database file."""
    if kind == "sqlite":
        return Stage(kind, f"sqlite:///{folder / 'fastq.db'}", folder, **settings)
    if kind == "redis":
        server: Redis = request.getfixturevalue("redis_server")
        return Stage(kind, empty_database(server), folder, **settings)
    rabbitmq: RabbitMQ = request.getfixturevalue("rabbitmq")
    return Stage(kind, rabbitmq.url(rabbitmq.new_vhost()), folder, rabbitmq, **settings)


_databases = itertools.cycle(range(5, 16))  # those below are other tests'


def empty_database(server: Redis) -> str:
    """Return the URL of a database of a Redis server that has nothing in it."""
    url = server.url(next(_databases))
    redis = BlockingRedis(parse_redis_url(url, Settings({})), 5.0, "test")
    redis.call("FLUSHDB")
    redis.close()
    return url


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Return when the condition holds."""
    wait_until(condition, timeout_s, lambda: TimeoutError(f"{what}: not so after {timeout_s} s"))
