"""huey's side of the benchmark, on SQLite.

By default SQLite never waits for the disk here (fsync=False, huey's fastest setting): a power cut loses tasks.
With BENCH_HUEY_FSYNC=1 each commit reaches the disk, as fastq's publishes do. Consumer and results are polled.
"""

from __future__ import annotations

import os

from huey import SqliteHuey

from bench.peers.counter import open_counter

RESULTS = os.environ.get("BENCH_BACKEND", "disabled") != "disabled"
huey = SqliteHuey(
    "bench",
    filename=os.environ["BENCH_BROKER"].removeprefix("sqlite:///"),
    results=RESULTS,
    fsync=os.environ.get("BENCH_HUEY_FSYNC") == "1",
)
counter = open_counter()


@huey.task()
def noop(number: int) -> int:
    counter.add()
    return number


def send() -> None:
    noop(1)


def call() -> None:
    noop(1).get(blocking=True, timeout=30, max_delay=0.0005)
