"""dramatiq's side of what waits: coroutines on its AsyncIO middleware's loop, a thread waiting for each."""

from __future__ import annotations

import asyncio

import dramatiq
from dramatiq.middleware.asyncio import AsyncIO

from bench.peers import HOLD_S, NAP_S, TASK
from bench.peers.dramatiq_app import broker, counter

broker.add_middleware(AsyncIO())


@dramatiq.actor
async def async_noop(number: int) -> None:
    counter.add()


@dramatiq.actor
async def async_nap(number: int) -> None:
    await asyncio.sleep(NAP_S)
    counter.add()


@dramatiq.actor(time_limit=HOLD_S * 1000)
async def async_hold(number: int) -> None:
    counter.add()
    await asyncio.sleep(HOLD_S)


sent = {"noop": async_noop, "nap": async_nap, "hold": async_hold}[TASK]


def send() -> None:
    sent.send(1)
