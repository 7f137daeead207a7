"""dramatiq's side of the benchmark.

It has no result store on RabbitMQ, so a "round trip" here ends when the task has run: less than what the others do.
"""

from __future__ import annotations

import os
import time

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from bench.peers.counter import open_counter

broker = RabbitmqBroker(url=os.environ["BENCH_BROKER"])
dramatiq.set_broker(broker)
counter = open_counter()


@dramatiq.actor
def noop(number: int) -> None:
    counter.add()


def send() -> None:
    noop.send(1)


def call() -> None:
    before = counter.total()
    noop.send(1)
    deadline = time.monotonic() + 30
    while counter.total() == before:
        if time.monotonic() > deadline:
            raise TimeoutError("the task did not run")
        time.sleep(0.0001)
