"""fastq's side of what waits: coroutines. Apart from fastq_app, whose workers are to have no child with a loop."""

from __future__ import annotations

import asyncio
import os

from bench.peers import HOLD_S, NAP_S, TASK
from bench.peers.counter import open_counter
from fastq import FastQ

app = FastQ("bench", broker=os.environ["BENCH_BROKER"], backend="disabled")
counter = open_counter()


@app.task(ignore_result=True)
async def noop(number: int) -> int:
    counter.add()
    return number


@app.task(ignore_result=True)
async def nap(number: int) -> int:
    await asyncio.sleep(NAP_S)
    counter.add()
    return number


@app.task(ignore_result=True)
async def hold(number: int) -> int:
    counter.add()
    await asyncio.sleep(HOLD_S)
    return number


sent = {"noop": noop, "nap": nap, "hold": hold}[TASK]


def send() -> None:
    sent.delay(1)


def send_batch(count: int) -> None:
    with app.batch():
        for _ in range(count):
            sent.delay(1)
