"""fastq's side of the benchmark: tasks that count themselves."""

from __future__ import annotations

import os
import time

from bench.peers import HOLD_S, NAP_S, TASK
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


@app.task(ignore_result=BACKEND == "disabled")
def nap(number: int) -> int:
    time.sleep(NAP_S)
    counter.add()
    return number


@app.task(ignore_result=BACKEND == "disabled")
def hold(number: int) -> int:
    counter.add()
    time.sleep(HOLD_S)
    return number


sent = {"noop": noop, "nap": nap, "hold": hold}[TASK]


def send() -> None:
    sent.delay(1)


def call() -> None:
    sent.delay(1).get(timeout=30)


def send_batch(count: int) -> None:
    with app.batch():
        for _ in range(count):
            sent.delay(1)
