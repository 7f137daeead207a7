"""huey's side of the benchmark, on SQLite.

huey's defaults are kept: WAL, and no fsync other than SQLite's default for it. Its consumer and its results are polled.
"""

from __future__ import annotations

import os

from huey import SqliteHuey

from bench.peers import client
from bench.peers.counter import open_counter

RESULTS = os.environ.get("BENCH_BACKEND", "disabled") != "disabled"
huey = SqliteHuey("bench", filename=os.environ["BENCH_BROKER"].removeprefix("sqlite:///"), results=RESULTS)
counter = open_counter()


@huey.task()
def noop(number: int) -> int:
    counter.add()
    return number


def send() -> None:
    noop(1)


def call() -> None:
    noop(1).get(blocking=True, timeout=30, max_delay=0.0005)


if __name__ == "__main__":
    client.main(send, call)
