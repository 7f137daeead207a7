"""taskiq's side of the benchmark: RabbitMQ by taskiq-aio-pika, Redis by taskiq-redis.

On Redis its list is the leanest broker, and a worker that dies loses what it has taken; with BENCH_TASKIQ_STREAM=1 a
stream, whose messages are acknowledged as fastq's are. It runs on uvloop, as uvloop is installed beside it.
"""

from __future__ import annotations

import asyncio
import os

from taskiq import AsyncBroker
from taskiq_aio_pika import AioPikaBroker
from taskiq_redis import ListQueueBroker, RedisStreamBroker

from bench.peers import HOLD_S, NAP_S, TASK
from bench.peers.counter import open_counter

URL = os.environ["BENCH_BROKER"]
PREFETCH = int(os.environ.get("BENCH_PREFETCH", "2000"))
SENT_AT_ONCE = 100


def make_broker() -> AsyncBroker:
    if not URL.startswith("redis:"):
        return AioPikaBroker(URL, qos=PREFETCH)
    # redis-py's timeout of 5 s would end a worker that waits or is stopped for longer, and lose the task it was given.
    if os.environ.get("BENCH_TASKIQ_STREAM") == "1":
        return RedisStreamBroker(URL, xread_count=PREFETCH, consumer_id="0", socket_timeout=None)
    return ListQueueBroker(URL, socket_timeout=None)


broker = make_broker()
counter = open_counter()


@broker.task
async def noop(number: int) -> int:
    counter.add()
    return number


@broker.task
async def nap(number: int) -> int:
    await asyncio.sleep(NAP_S)
    counter.add()
    return number


@broker.task
async def hold(number: int) -> int:
    counter.add()
    await asyncio.sleep(HOLD_S)
    return number


sent = {"noop": noop, "nap": nap, "hold": hold}[TASK]


def send() -> None:
    send_batch(1)


def send_batch(count: int) -> None:
    asyncio.run(_send_batch(count))


async def _send_batch(count: int) -> None:
    await broker.startup()
    for first in range(0, count, SENT_AT_ONCE):
        await asyncio.gather(*(sent.kiq(1) for _ in range(first, min(first + SENT_AT_ONCE, count))))
    await broker.shutdown()
