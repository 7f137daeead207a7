"""fastq's side of the benchmark: a no-op task that counts itself."""

from __future__ import annotations

import os

from bench.peers.counter import open_counter
from fastq import FastQ

BACKEND = os.environ.get("BENCH_BACKEND", "disabled")
CONFIRM = os.environ.get("BENCH_CONFIRM", True)  # True: each send waits for its confirm
app = FastQ(
    "bench",
    broker=os.environ["BENCH_BROKER"],
    backend=BACKEND,
    broker_transport_options={"confirm_publish": CONFIRM},
)
counter = open_counter()


@app.task(ignore_result=BACKEND == "disabled")
def noop(number: int) -> int:
    counter.add()
    return number


def send() -> None:
    noop.delay(1)


def call() -> None:
    noop.delay(1).get(timeout=30)


def send_batch(count: int) -> None:
    with app.batch():
        for _ in range(count):
            noop.delay(1)
