"""Micro-benchmark of the message loop with one real child and a broker made of lists: a no-op from delivery to ack."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop

from fastq._child import TaskRules
from fastq._core import Core
from fastq.pool import PoolOptions
from fastq.pool.supervisor import Pool
from fastq.pool.zygote import start_zygote
from fastq.wire.ids import new_id
from fastq.wire.message import encode_task
from tests.support.core_with_children import ListBroker, RecordingHooks, child_main

MESSAGES = 2000
PREFETCH = 1000


@pytest.fixture
def broker() -> Iterator[ListBroker]:
    """A running loop's broker, not yet given anything."""
    zygote = start_zygote(child_main)
    loop = uvloop.new_event_loop()
    hooks = RecordingHooks(loop)
    pool = hooks.pool = Pool(
        loop,
        zygote,
        PoolOptions(
            1,
            lambda pid, reason: hooks.lost.append((pid, reason)),
            lambda text: hooks.events.append(("fatal", text)),
        ),
    )
    core = Core(loop, [TaskRules("noop")], hooks, pool)
    loop.run_until_complete(pool.start(core))
    broker = ListBroker(loop, PREFETCH)
    core.set_store(broker)
    core.add_source(broker)
    core.set_outlet(broker)
    yield broker
    loop.run_until_complete(pool.stop(1))
    pool.close()
    loop.close()


def test_run_two_thousand_noops(benchmark: Callable[..., Any], broker: ListBroker) -> None:
    message = encode_task("noop", new_id(), b"[[],{},{}]", ignore_result=True)

    async def drain() -> None:
        expected = len(broker.settled) + MESSAGES
        for _ in range(MESSAGES):
            broker.put_raw(message.props, message.body)
        await broker.until(lambda: len(broker.settled) >= expected)

    def run() -> None:
        broker.loop.run_until_complete(asyncio.wait_for(drain(), 30))

    benchmark(run)
    assert {verdict for _, verdict in broker.settled} == {0}
