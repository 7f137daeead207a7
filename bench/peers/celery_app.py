"""Celery's side of the benchmark, set up as a competent user would for throughput.

With BENCH_ACCELERATE=1 its messages are sent by `fastq.accelerate`, with =behind not waiting for Redis's answers.
"""

from __future__ import annotations

import os
import time

from celery import Celery

from bench.peers import HOLD_S, NAP_S, TASK
from bench.peers.counter import open_counter

BACKEND = os.environ.get("BENCH_BACKEND", "disabled")
app = Celery("bench", broker=os.environ["BENCH_BROKER"], backend=None if BACKEND == "disabled" else BACKEND)
app.conf.update(
    task_ignore_result=BACKEND == "disabled",
    worker_prefetch_multiplier=1000,
    worker_send_task_events=False,
    worker_hijack_root_logger=False,
    worker_enable_remote_control=False,
    broker_connection_retry_on_startup=True,
)
counter = open_counter()
if accelerates := os.environ.get("BENCH_ACCELERATE"):
    import fastq

    fastq.accelerate(app, confirm_behind=accelerates == "behind")


@app.task
def noop(number: int) -> int:
    counter.add()
    return number


@app.task
def nap(number: int) -> int:
    time.sleep(NAP_S)
    counter.add()
    return number


@app.task
def hold(number: int) -> int:
    counter.add()
    time.sleep(HOLD_S)
    return number


sent = {"noop": noop, "nap": nap, "hold": hold}[TASK]


def send() -> None:
    sent.delay(1)


def call() -> None:
    sent.delay(1).get(timeout=30)
