"""dramatiq's side of the benchmark.

It has no result store on RabbitMQ, so a "round trip" here ends when the task has run: less than what the others do.
"""

from __future__ import annotations

import os
import time

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker

from bench.peers import HOLD_S, NAP_S, TASK
from bench.peers.counter import open_counter

URL = os.environ["BENCH_BROKER"]
broker = RedisBroker(url=URL) if URL.startswith("redis:") else RabbitmqBroker(url=URL)
dramatiq.set_broker(broker)
counter = open_counter()


@dramatiq.actor
def noop(number: int) -> None:
    counter.add()


@dramatiq.actor
def nap(number: int) -> None:
    time.sleep(NAP_S)
    counter.add()


@dramatiq.actor(time_limit=HOLD_S * 1000)
def hold(number: int) -> None:
    counter.add()
    time.sleep(HOLD_S)


sent = {"noop": noop, "nap": nap, "hold": hold}[TASK]


def send() -> None:
    sent.send(1)


def call() -> None:
    before = counter.total()
    sent.send(1)
    deadline = time.monotonic() + 30
    while counter.total() == before:
        if time.monotonic() > deadline:
            raise TimeoutError("the task did not run")
        time.sleep(0.0001)
