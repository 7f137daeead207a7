"""The calls whose messages are compared byte for byte, and how the bytes are read back. No test of its own.

All that differs from run to run is pinned: ids are counted, the clock stands, the process has a given name.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any
from unittest import mock

import celery
from celery import chain, chord, group
from celery._state import _task_stack
from celery.exceptions import CDeprecationWarning
from kombu import Exchange, Queue
from redis import Redis as RedisClient

from fastq.brokers.rabbitmq.connection import BlockingConnection
from fastq.brokers.rabbitmq.handshake import frame
from fastq.brokers.rabbitmq.url import parse_amqp_url
from fastq.errors import SettingsError
from fastq.wire.amqp import METHODS

TIMEOUT_S = 10.0
GET_CHANNEL = 3

NOW = dt.datetime(2026, 11, 22, 12, 30, 45, 123456, tzinfo=dt.timezone.utc)
QUEUES = ("celery", "special", "topics", "ranked", "routed", "fresh", "created")
#: Queues that the application names; the others are made when they are used.
NAMED = (
    Queue("celery", Exchange("celery"), "celery"),
    Queue("special", Exchange("special"), "special"),
    Queue("topics", Exchange("topics", type="topic"), "topics.#"),
    Queue("ranked", Exchange("ranked", delivery_mode=1), "ranked", max_priority=9),
)

Call = Callable[["Tasks"], object]


class Tasks:
    """An application for these calls, and its tasks."""

    def __init__(self, broker_url: str, **settings: Any) -> None:
        self.app = app = celery.Celery("golden", broker=broker_url, backend="cache+memory://", set_as_current=False)
        app.conf.update(
            task_queues=NAMED,
            task_routes={"golden.routed": {"queue": "routed", "priority": 4}, "golden.pattern.*": "routed"},
            accept_content=["json", "pickle", "yaml", "msgpack"],
            **settings,
        )
        self.add = app.task(name="golden.add")(_any)
        self.quiet = app.task(name="golden.quiet", ignore_result=True)(_any)
        self.routed = app.task(name="golden.routed")(_any)
        self.pattern = app.task(name="golden.pattern.one")(_any)
        options: dict[str, Any] = {"priority": 6, "expires": 60, "time_limit": 30, "soft_time_limit": 20}
        self.tuned = app.task(name="golden.tuned", queue="special", **options)(_any)
        self.tight = app.task(name="golden.tight", compression="zlib", serializer="msgpack")(_any)
        with warnings.catch_warnings():
            # That a task names its queue is out of favour, and done everywhere.
            warnings.simplefilter("ignore", CDeprecationWarning)
            app.finalize()


def _any(*args: Any, **kwargs: Any) -> None:
    return None


class Own:
    """A value with a JSON form of its own."""

    def __json__(self) -> Any:
        return {"own": [1, 2]}

    def __repr__(self) -> str:
        return "Own('form')"


def inside(tasks: Tasks, send: Callable[[], object], **request: Any) -> None:
    """Send from within a running task."""
    task = tasks.add
    task.push_request(
        id="the-parent", root_id="the-root", called_directly=False, delivery_info={"priority": 3}, args=(), **request
    )
    _task_stack.push(task)
    try:
        send()
    finally:
        _task_stack.pop()
        task.pop_request()


#: How many messages come of a call where it is not one; RabbitMQ drops what has no time left.
MESSAGES = {"expired": 0, "expires at once": 0, "group": 3, "chord": 2}

NESTED = {"a": [1, {"b": (2, [3, {"c": {4: "d"}}])}], "e": [], "f": {}, "g": ((),)}
MOMENT = dt.datetime(2027, 1, 2, 3, 4, 5, 678901, tzinfo=dt.timezone(dt.timedelta(hours=2)))

CALLS: dict[str, Call] = {
    "nothing": lambda t: t.add.delay(),
    "numbers": lambda t: t.add.delay(1, -2, 2.5, 1e300, True, None, 2**31, 2**63, 2**200, -0.0),
    "infinity": lambda t: t.add.delay(float("inf"), float("nan")),
    "text": lambda t: t.add.delay("plain", "it's", 'say "hi"', "back\\slash", "line\nbreak\ttab\x00\x7f", "a" * 70),
    "unicode": lambda t: t.add.delay("ü€😀", "\u2028", clé="日本"),
    "long text": lambda t: t.add.delay("word " * 400, x="y" * 2000),
    "many": lambda t: t.add.delay(*range(600)),
    "just too long": lambda t: t.add.delay("a" * 1019, "b"),
    "keywords": lambda t: t.add.delay(1, x=2, y=[3, None], z={"k": "v"}),
    "nested": lambda t: t.add.delay(NESTED, [NESTED]),
    "list of arguments": lambda t: t.add.apply_async([1, [2]], {"x": (3,)}),
    "dates": lambda t: t.add.delay(MOMENT, MOMENT.date(), MOMENT.time(), at=[MOMENT]),
    "uuid and decimal": lambda t: t.add.delay(uuid.UUID(int=7), Decimal("1.10"), n=Decimal("-0")),
    "bytes": lambda t: t.add.delay(b"text", b"\xff\x00", x=b""),
    "own form": lambda t: t.add.delay(Own(), {1: 2, None: 3, False: 4, 2.5: 5}),
    "countdown": lambda t: t.add.apply_async((1,), countdown=90),
    "eta": lambda t: t.add.apply_async((1,), eta=MOMENT),
    "naive eta": lambda t: t.add.apply_async((1,), eta=MOMENT.replace(tzinfo=None)),
    "expires": lambda t: t.add.apply_async((1,), expires=12.5),
    "expires at": lambda t: t.add.apply_async((1,), expires=MOMENT),
    "expired": lambda t: t.add.apply_async((1,), expires=-5),
    "expires at once": lambda t: t.add.apply_async((1,), expires=0),
    "priority": lambda t: t.add.apply_async((1,), priority=7),
    "no priority in a queue": lambda t: t.add.apply_async((1,), queue="special"),
    "priority in a queue": lambda t: t.add.apply_async((1,), queue="ranked", priority=9),
    "queue object": lambda t: t.add.apply_async((1,), queue=Queue("fresh", Exchange("fresh"), "fresh")),
    "new queue": lambda t: t.add.apply_async((1,), queue="created"),
    "exchange and key": lambda t: t.add.apply_async((1,), exchange="special", routing_key="special"),
    "exchange alone": lambda t: t.add.apply_async((1,), exchange="special"),
    "key alone": lambda t: t.add.apply_async((1,), routing_key="special"),
    "topic queue": lambda t: t.add.apply_async((1,), queue="topics", routing_key="topics.a.b"),
    "routed": lambda t: t.routed.delay(1),
    "routed by pattern": lambda t: t.pattern.delay(1),
    "route overruled": lambda t: t.routed.apply_async((1,), queue="special", priority=1),
    "options of the task": lambda t: t.tuned.delay(1),
    "options of the task overruled": lambda t: t.tuned.apply_async((1,), priority=2, expires=None, time_limit=5),
    "by name": lambda t: t.app.send_task("golden.unknown", (1,), {"x": 2}),
    "by name of a task": lambda t: t.app.send_task("golden.tuned", (1,)),
    "by name, ignored": lambda t: t.app.send_task("golden.unknown", ignore_result=True, task_id="given"),
    "headers": lambda t: t.add.apply_async((1,), headers={"mine": "x", "n": 5, "big": 2**40, "low": -(2**31)}),
    "headers of all kinds": lambda t: t.add.apply_async(
        (1,), headers={"f": 1.5, "b": True, "none": None, "list": [1, "x", {"y": []}], "ü": "ü", "task": "other"}
    ),
    "date in headers": lambda t: t.add.apply_async((1,), headers={"at": "2026-11-22", "raw": "bytes"}),
    "shadow": lambda t: t.add.apply_async((1,), shadow="another name"),
    "result ignored": lambda t: t.quiet.delay(1),
    "result ignored by the call": lambda t: t.add.apply_async((1,), ignore_result=True),
    "transient": lambda t: t.add.apply_async((1,), delivery_mode=1),
    "transient by name": lambda t: t.add.apply_async((1,), delivery_mode="transient"),
    "time limits": lambda t: t.add.apply_async((1,), time_limit=10, soft_time_limit=5),
    "reply to": lambda t: t.add.apply_async((1,), reply_to="elsewhere", task_id="given"),
    "retries": lambda t: t.add.apply_async((1,), retries=3, group_id="g", group_index=2),
    "nesting": lambda t: t.add.apply_async((1,), replaced_task_nesting=2),
    "link": lambda t: t.add.apply_async((1,), link=t.quiet.s(2), link_error=[t.add.s(3), t.quiet.si(4)]),
    "no retry": lambda t: t.add.apply_async((1,), retry=False, retry_policy={"max_retries": 1}),
    "signature": lambda t: t.add.s(1, x=2).set(priority=5, queue="special").apply_async((0,)),
    "stamped": lambda t: _stamped(t.add.s(1)).apply_async(),
    "stamped options": lambda t: t.add.apply_async((1,), stamped_headers=["who"], who="me"),
    "chain": lambda t: chain(t.add.s(1), t.quiet.s(2), t.add.s(3)).apply_async(),
    "group": lambda t: group(t.add.s(n) for n in range(3)).apply_async(),
    "chord": lambda t: chord([t.add.s(1), t.add.s(2)], t.quiet.s()).apply_async(),
    "chain of groups": lambda t: chain(t.add.s(1), group(t.add.s(2), t.add.s(3)), t.quiet.s()).apply_async(),
    "zlib": lambda t: t.add.apply_async(("x" * 500,), compression="zlib"),
    "bzip2": lambda t: t.add.apply_async(("x" * 500,), compression="bzip2"),
    "pickle": lambda t: t.add.apply_async((MOMENT, {1}, b"\xff"), serializer="pickle"),
    "yaml": lambda t: t.add.apply_async(("ü", [1, {"a": None}]), serializer="yaml"),
    "msgpack": lambda t: t.add.apply_async(("ü", [1, {"a": None}]), serializer="msgpack"),
    "options of the serializer": lambda t: t.tight.delay("x" * 300),
    "in a running task": lambda t: inside(t, lambda: t.add.delay(1)),
    "chain in a running task": lambda t: inside(t, lambda: chain(t.add.s(1), t.quiet.s(2)).apply_async()),
    "family given": lambda t: inside(t, lambda: t.add.apply_async((1,), root_id="r", parent_id="p")),
    "root given": lambda t: inside(t, lambda: t.add.apply_async((1,), root_id="r")),
    "stamps in a running task": lambda t: inside(
        t, lambda: t.add.s(1).apply_async(), stamped_headers=["who"], stamps={"who": ["me"]}
    ),
}


def _stamped(signature: Any) -> Any:
    signature.stamp(who=["me", "you"])
    return signature


@contextlib.contextmanager
def pinned(app: celery.Celery) -> Iterator[None]:
    """Let ids be counted, the clock stand, and the process have a given name."""
    numbers = itertools.count(1)

    def next_id() -> str:
        return str(uuid.UUID(int=next(numbers)))

    app._local.oid = "00000000-aaaa-bbbb-cccc-000000000000"
    with contextlib.ExitStack() as patches:
        for name in ("celery.app.base.uuid", "celery.canvas.uuid", "celery.app.task.uuid"):
            patches.enter_context(mock.patch(name, next_id))
        patches.enter_context(mock.patch("celery.app.amqp.anon_nodename", return_value="gen1@golden"))
        patches.enter_context(mock.patch.object(app, "now", return_value=NOW))
        yield


Sent = dict[str, list[dict[str, str]]]
#: Takes messages out of the queues until there are so many.
Collect = Callable[[int], list[dict[str, str]]]


def send_all(tasks: Tasks, collect: Collect) -> Sent:
    """Make every call and return the messages of each."""
    sent = {}
    for name, call in CALLS.items():
        with pinned(tasks.app):
            call(tasks)
        sent[name] = collect(MESSAGES.get(name, 1))
    return sent


@contextlib.contextmanager
def amqp_collector(url: str) -> Iterator[Collect]:
    """Lend a function that takes all messages out of the queues of a virtual host, as bytes in hex."""
    connection = BlockingConnection(parse_amqp_url(url, False), "golden", 5.0, 5.0, 1 << 20)

    def collect(count: int) -> list[dict[str, str]]:
        found = []
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            for queue in QUEUES:
                found += amqp_messages(connection, queue)
            # Nothing confirms what Celery publishes, so it may be on its way still.
            if len(found) >= count or time.monotonic() > deadline:
                return sorted(found, key=lambda message: QUEUES.index(message["queue"]))

    try:
        yield collect
    finally:
        connection.close()


def amqp_messages(connection: BlockingConnection, queue: str) -> list[dict[str, str]]:
    """Return the messages of one queue; nothing when there is no such queue."""
    try:
        connection.rpc(GET_CHANNEL, "queue.declare", queue=queue, passive=True)
    except SettingsError:
        return []
    found = []
    while True:
        connection.transmit(frame("basic.get", GET_CHANNEL, queue=queue, no_ack=True))
        event = connection.next_event(time.monotonic() + TIMEOUT_S)
        assert event is not None
        if event.method_id != METHODS["basic.get-ok"]:
            return found
        found.append({"queue": queue, "properties": event.props.hex(), "body": event.body.hex()})


@contextlib.contextmanager
def redis_collector(url: str) -> Iterator[Collect]:
    """Lend a function that takes all messages out of the lists of a database, with the delivery tags left out."""
    client = RedisClient.from_url(url)

    def collect(count: int) -> list[dict[str, str]]:
        found = []
        for key in sorted(key for key in client.keys("*") if client.type(key) == b"list"):
            while (raw := client.rpop(key)) is not None:
                text = re.sub(r'"delivery_tag": "[0-9a-f-]{36}"', '"delivery_tag": "-"', raw.decode())
                found.append({"list": key.decode(), "message": text})
        return found

    try:
        yield collect
    finally:
        client.close()
