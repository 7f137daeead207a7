"""An accelerated application sends what Celery sends, byte for byte: as it does now, and as it did for the files."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import celery
import pytest

import fastq
from tests.celery.golden_calls import CALLS, Sent, Tasks, amqp_collector, redis_collector, send_all
from tests.celery.make_golden import FOLDER
from tests.support.servers import RabbitMQ, Redis


class Capture:
    """What one broker got from stock Celery and from an accelerated application, and from which calls kombu sent."""

    def __init__(self, url: str, collector: Callable[[str], contextlib.AbstractContextManager[Any]]) -> None:
        stock, fast = Tasks(url), Tasks(url)
        assert fastq.accelerate(fast.app) is fast.app
        with collector(url) as collect:
            collect(0)
            self.stock: Sent = send_all(stock, collect)
            self.fast: Sent = send_all(fast, collect)
        for tasks in (stock, fast):
            tasks.app.close()


@functools.cache
def golden(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(FOLDER, f"{name}.json").read_text(encoding="ascii"))
    return content


@pytest.fixture(scope="module")
def on_rabbitmq(rabbitmq: RabbitMQ) -> Iterator[Capture]:
    vhost = rabbitmq.new_vhost()
    yield Capture(rabbitmq.url(vhost), amqp_collector)
    rabbitmq.delete_vhost(vhost)


@pytest.fixture(scope="module")
def on_redis(redis_server: Redis) -> Capture:
    return Capture(redis_server.url(11), redis_collector)


@pytest.mark.rabbitmq
@pytest.mark.parametrize("call", CALLS)
def test_rabbitmq_gets_the_bytes_that_celery_sends(on_rabbitmq: Capture, call: str) -> None:
    assert on_rabbitmq.fast[call] == on_rabbitmq.stock[call]


@pytest.mark.redis
@pytest.mark.parametrize("call", CALLS)
def test_redis_gets_the_text_that_celery_sends(on_redis: Capture, call: str) -> None:
    assert on_redis.fast[call] == on_redis.stock[call]
    assert on_redis.fast[call] != []


@pytest.mark.rabbitmq
@pytest.mark.parametrize("call", CALLS)
def test_rabbitmq_gets_what_the_golden_file_holds(on_rabbitmq: Capture, call: str) -> None:
    assert on_rabbitmq.fast[call] == of_this_celery("rabbitmq")[call]


@pytest.mark.redis
@pytest.mark.parametrize("call", CALLS)
def test_redis_gets_what_the_golden_file_holds(on_redis: Capture, call: str) -> None:
    assert on_redis.fast[call] == of_this_celery("redis")[call]


def of_this_celery(name: str) -> Sent:
    """Return a file's messages; another release of Celery may send others."""
    made_by = golden(name)["made_by"]["celery"]
    if made_by != celery.__version__:
        pytest.skip(f"the file was made by Celery {made_by}")
    messages: Sent = golden(name)["messages"]
    return messages
