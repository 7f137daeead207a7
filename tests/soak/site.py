"""One application on one broker: its two workers behind proxies, the threads that send to it, and its ledger.

What is sent is confirmed. What the broker refuses, or does not confirm in time, is sent again under the same number
until it is confirmed, so a number may be there twice by the sender's doing: those are counted apart.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from celery import chain, chord
from redis import Redis as RedisClient
from redis.exceptions import RedisError

from fastq import FastQ
from fastq.errors import FastqError
from fastq.wire.ids import new_id
from tests.soak.celery_tasks import make_app
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import RabbitMQ, Redis
from tests.support.task_ledger import DONE, RECORD, START
from tests.support.worker_process import Program, WorkerProcess

TICK_S = 0.1
SENDERS = {"fastq": 1, "celery": 6}  # Celery waits for each confirm by itself
RESULT_AGE_S = 5.0  # when a result is first looked for
RESULT_EXPIRES_S = 7200  # a chord has its counters no longer; one that waits in a backlog would be lost with them
QUEUE = "celery"

#: Of 100 units; a workflow has two or three numbers.
MIX = {"short": 55, "long": 4, "fail": 2, "retry": 10, "answer": 17, "countdown": 8, "workflow": 4}

Application = Literal["fastq", "celery"]


@dataclass(frozen=True, slots=True)
class Unit:
    """What is sent in one step: a call, or a workflow with the numbers that follow."""

    kind: str
    numbers: tuple[int, ...]
    seconds: float = 0.0


class Tally:
    """The ledger, read on from where it was read last: how often each number began and ended, up to 255."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = bytearray()
        self.done = bytearray()
        self._offset = 0

    def read(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = len(data) - len(data) % RECORD.size
        self._offset += whole
        counts = {START: self.started, DONE: self.done}
        for what, number, _, _ in RECORD.iter_unpack(data[:whole]):
            count = counts[what]
            if number >= len(count):
                count.extend(bytes(number + 1 - len(count)))
            count[number] = min(255, count[number] + 1)

    def is_done(self, number: int) -> bool:
        return number < len(self.done) and self.done[number] > 0


class Site:
    """See the module. ``program`` runs the workers, ``settings`` are theirs alone."""

    def __init__(
        self,
        application: Application,
        broker: RabbitMQ | Redis,
        results: Redis,
        databases: tuple[int, int],
        folder: Path,
        program: Program,
        settings: dict[str, Any],
        seed: int,
    ) -> None:
        self.name = f"{'FastQ' if application == 'fastq' else 'Celery'} on {type(broker).__name__}"
        self.application = application
        self.broker = broker
        self.results = results
        self.folder = folder
        self.program: Program = program
        self.database, self.result_database = databases
        self.vhost = broker.new_vhost() if isinstance(broker, RabbitMQ) else ""
        self.url = broker.url(self.vhost) if isinstance(broker, RabbitMQ) else broker.url(self.database)
        self.result_url = results.url(self.result_database)
        self.proxies = [[FaultProxy("127.0.0.1", server.port).start() for server in self.servers] for _ in range(2)]
        self._settings = {"result_expires": RESULT_EXPIRES_S, **settings}
        self.workers = [self._worker(index) for index in range(2)]
        self.tally = Tally(folder / "ledger.bin")
        self.sent: list[int] = []  # confirmed
        self.repeated: set[int] = set()  # sent more than once, as the first time was not confirmed
        self.refusals: Counter[str] = Counter()
        self.answers = 0
        self._awaited: deque[tuple[int, str, float]] = deque()
        self._seed = seed
        self._numbers = itertools.count()
        self._numbering = threading.Lock()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._redis = RedisClient(port=results.port, db=self.result_database, socket_timeout=5.0)
        self._clients: list[Any] = []

    @property
    def servers(self) -> list[RabbitMQ | Redis]:
        return [self.broker] if self.broker is self.results else [self.broker, self.results]

    def close(self) -> None:
        """Kill what still runs and close every connection."""
        self._stopping.set()
        for worker in self.workers:
            worker.kill9()
        for proxy in itertools.chain(*self.proxies):
            proxy.close()
        for client in self._clients:
            client.close()
        self._redis.close()

    # -- workers

    def start(self) -> None:
        """Return when both workers are ready."""
        for worker in self.workers:
            worker.start()

    def _worker(self, index: int) -> WorkerProcess:
        """The first one keeps its main process and its oldest child; to the second everything may happen."""
        folder = self.folder / f"worker{index + 1}"
        folder.mkdir()
        proxies = dict(zip(self.servers, self.proxies[index], strict=True))
        url, result_url = proxies[self.broker].url(self.url), proxies[self.results].url(self.result_url)
        if self.application == "fastq":
            env = {
                "FASTQ_BROKER_URL": url,
                "FASTQ_RESULT_BACKEND": result_url,
                "FASTQ_TEST_SETTINGS": json.dumps(self._settings),
            }
        else:
            env = {
                "SOAK_SETTINGS": json.dumps({"broker_url": url, "result_backend": result_url, **self._settings}),
                "C_FORCE_ROOT": "1",
            }
        return WorkerProcess(
            folder,
            *("-c", "2" if index == 0 else "1", "-n", f"w{index + 1}@{self.application}"),
            app="tests.soak.tasks" if self.application == "fastq" else "tests.soak.celery_tasks",
            env={**env, "FASTQ_TEST_LEDGER": str(self.folder / "ledger.bin")},
            log_level="INFO" if self.program == "celery" else "WARNING",
            await_ready=False,
            program=self.program,
        )

    # -- sending

    def start_sending(self, per_second: float) -> None:
        """Send that many numbers a second, from now on, in threads of their own."""
        count = SENDERS[self.application]
        for index in range(count):
            thread = threading.Thread(
                target=self._send, args=(random.Random(self._seed + index), per_second / count), daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def stop_sending(self) -> None:
        """Return when everything that was begun is confirmed."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(60.0)
            assert not thread.is_alive(), f"{self.name}: a sender hangs"

    def _send(self, generator: random.Random, per_second: float) -> None:
        client = self._client()
        self._clients.append(client)
        due = time.monotonic()
        owed = 0.0
        while not self._stopping.is_set():
            due = max(due + TICK_S, time.monotonic() - 1.0)  # what was not sent for a broker that was away is not due
            time.sleep(max(0.0, due - time.monotonic()))
            owed += per_second * TICK_S
            units = []
            while owed >= 1:
                units.append(self._unit(generator))
                owed -= len(units[-1].numbers)
            if self.application == "fastq":
                self._send_until_confirmed(client, units)
            else:
                for unit in units:
                    self._send_until_confirmed(client, [unit])

    def _send_until_confirmed(self, client: Any, units: list[Unit]) -> None:
        numbers = [number for unit in units for number in unit.numbers]
        while True:
            answers = [(unit.numbers[0], new_id(), time.monotonic()) for unit in units if unit.kind == "answer"]
            task_ids = {number: task_id for number, task_id, _ in answers}
            try:
                with client.batch() if isinstance(client, FastQ) else contextlib.nullcontext():
                    for unit in units:
                        send_unit(client, unit, task_ids.get(unit.numbers[0]))
                break
            except (FastqError, OSError, RedisError, *client_errors()) as error:
                self.refusals[type(error).__name__] += 1
                self.repeated.update(numbers)
                time.sleep(0.2)
        self.sent += numbers
        self._awaited.extend(answers)

    def _unit(self, generator: random.Random) -> Unit:
        (kind,) = generator.choices(list(MIX), list(MIX.values()))
        count = 1
        if kind == "workflow":
            kind, count = ("next", 2) if self.application == "fastq" else generator.choice((("chain", 2), ("chord", 3)))
        seconds = {"long": (0.005, 0.05), "retry": (0.0, 2.0), "countdown": (1.0, 12.0)}.get(kind, (0.0, 0.0))
        with self._numbering:
            numbers = tuple(next(self._numbers) for _ in range(count))
        return Unit(kind, numbers, round(generator.uniform(*seconds), 3))

    def _client(self) -> Any:
        if self.application == "fastq":
            return FastQ("sender", broker=self.url, backend=self.result_url)
        options = {"confirm_publish": True, "confirm_timeout": 10} if self.vhost else {"socket_timeout": 10}
        client = make_app(
            {
                "broker_url": self.url,
                "result_backend": self.result_url,
                "redis_socket_timeout": 10.0,
                "broker_transport_options": options,
                "task_publish_retry": False,  # repeated here, where it is counted
                "result_expires": RESULT_EXPIRES_S,
            },
            set_as_current=False,
        )
        client.backend.on_task_call = lambda *call: None  # results are read by `look`, nobody waits for them
        client.backend.result_consumer.cancel_for = lambda task_id: None
        return client

    # -- what became of it

    def look(self) -> None:
        """Read the ledger on, and take the results that are there."""
        self.tally.read()
        now = time.monotonic()
        ripe: list[tuple[int, str, float]] = []
        while self._awaited and now - self._awaited[0][2] >= RESULT_AGE_S and len(ripe) < 2000:
            ripe.append(self._awaited.popleft())
        if not ripe:
            return
        keys = [f"celery-task-meta-{task_id}" for _, task_id, _ in ripe]
        try:
            found = self._redis.mget(keys)
            self._redis.delete(*(key for key, value in zip(keys, found, strict=True) if value is not None), "none")
        except (RedisError, OSError):
            self._awaited.extendleft(reversed(ripe))
            return
        for each, value in zip(ripe, found, strict=True):
            if value is not None and json.loads(value)["result"] == each[0]:
                self.answers += 1
            else:
                self._awaited.append(each)

    def missing(self) -> list[int]:
        """Return the numbers that were sent and have not reached their end."""
        return [number for number in self.sent if not self.tally.is_done(number)]

    def missing_answers(self) -> list[int]:
        """Return the numbers whose results have not been there."""
        return [number for number, _, _ in self._awaited]

    def twice(self) -> int:
        """Return how many numbers ended more than once, without those that were sent more than once."""
        return sum(count > 1 and number not in self.repeated for number, count in enumerate(self.tally.done))

    def held(self) -> int:
        """Return how many messages the broker has, whoever holds them. Raises when it does not answer."""
        if isinstance(self.broker, RabbitMQ):
            return int(
                self.broker.evaluate(
                    "lists:sum([proplists:get_value(messages, rabbit_amqqueue:info(Q, [messages])) || "
                    f'Q <- rabbit_amqqueue:list(<<"{self.vhost}">>), '
                    'binary:match(element(4, element(2, Q)), [<<"celeryev">>, <<"pidbox">>]) =:= nomatch])'
                )
            )
        with self._broker_redis() as redis, redis.pipeline() as together:
            for name in (QUEUE, *(f"{QUEUE}\x06\x16{step}" for step in (3, 6, 9))):
                together.llen(name)
            together.zcard(f"{QUEUE}.delayed")
            together.hlen("unacked")
            return int(sum(together.execute()))

    def places(self) -> int:
        """Return how many queues the virtual host has, or keys the database. Raises when the broker does not answer."""
        if isinstance(self.broker, RabbitMQ):
            return int(self.broker.evaluate(f'length(rabbit_amqqueue:list(<<"{self.vhost}">>))'))
        with self._broker_redis() as redis:
            return int(redis.dbsize())

    def keys_for_ever(self) -> int:
        """Return how many keys in the result store never expire."""
        return sum(self._redis.ttl(key) == -1 for key in self._redis.scan_iter(count=1000))

    @contextlib.contextmanager
    def _broker_redis(self) -> Iterator[RedisClient]:
        client = RedisClient(port=self.broker.port, db=self.database, socket_timeout=5.0)
        try:
            yield client
        finally:
            client.close()


def client_errors() -> tuple[type[Exception], ...]:
    """Return what Celery's client raises when a broker is away or refuses."""
    from amqp.exceptions import AMQPError
    from kombu.exceptions import KombuError

    return (KombuError, AMQPError)


def send_unit(client: Any, unit: Unit, task_id: str | None) -> None:
    """Send one unit with either client."""
    first = unit.numbers[0]
    options = {"ignore_result": True}
    match unit.kind:
        case "short":
            client.send_task("work", (first,), **options)
        case "long":
            client.send_task("work", (first, unit.seconds), **options)
        case "countdown":
            client.send_task("work", (first,), countdown=unit.seconds, **options)
        case "fail":
            client.send_task("fail", (first,), **options)
        case "retry":
            client.send_task("retry_once", (first, unit.seconds), **options)
        case "answer":
            client.send_task("answer", (first,), task_id=task_id)
        case "next":
            client.send_task("send_next", (first,), **options)
        case "chain":
            steps = [client.signature("work", (number,), immutable=True) for number in unit.numbers]
            chain(*steps, app=client).apply_async()
        case "chord":
            header = [client.signature("answer", (number,)) for number in unit.numbers[:-1]]
            body = client.signature("collect", (unit.numbers[-1],))
            chord(header, app=client)(body)
        case other:
            raise AssertionError(other)
