"""What a worker keeps of connections that were lost: next to nothing, although it hardly asks the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import uvloop

from fastq import FastQ
from fastq.brokers import open_bus, open_consumer
from fastq.errors import ConnectionLost
from fastq.results import open_saver
from fastq.settings import Settings
from fastq.testing import worker
from fastq.worker.remote.clock import LamportClock
from tests.support.core_with_children import Running, run_loop
from tests.support.fault_proxy import FaultProxy

MIB = 1 << 20
TIMES, BEFORE = 300, 20


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Have nothing freed but what nobody refers to, as in a worker between two rare collections."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a private server: RabbitMQ or Redis, as the test's parameter says."""
    if request.param == "rabbitmq":
        return str(request.getfixturevalue("amqp_url"))
    return str(request.getfixturevalue("redis_server").url(4))


@pytest.fixture
def proxy(url: str, fault_proxy: Callable[[str, int], FaultProxy]) -> FaultProxy:
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    return fault_proxy(address.hostname, address.port)


async def _consumer(url: str) -> Any:
    consumer = open_consumer(url, Settings(), None)
    await consumer.open()
    await consumer.consume(["celery"], 10)
    return consumer


async def _saver(url: str) -> Any:
    saver = open_saver(url, Settings(), None)
    await saver.open()
    return saver


async def _bus(url: str) -> Any:
    bus = open_bus(url, Settings(), LamportClock())
    await bus.open("node@host", lambda headers, body: None)
    return bus


def grown_by(lose: Callable[[], Any]) -> tuple[float, int]:
    """Return by how many MiB and descriptors this process grows while it loses TIMES connections, after some others."""

    async def lose_many() -> tuple[float, int]:
        before = descriptors = 0
        for number in range(TIMES + BEFORE):
            if number == BEFORE:
                before, descriptors = process.memory_info().rss, process.num_fds()
            await lose()
            await asyncio.sleep(0.01)  # callbacks of the transport's end
        return (process.memory_info().rss - before) / MIB, process.num_fds() - descriptors

    process = psutil.Process()
    loop = uvloop.new_event_loop()
    try:
        return loop.run_until_complete(lose_many())
    finally:
        loop.close()


CONNECTIONS = [
    pytest.param(server, make, marks=getattr(pytest.mark, server), id=f"{server}{make.__name__}")
    for server, make in (
        ("rabbitmq", _consumer),
        ("rabbitmq", _bus),
        ("redis", _consumer),
        ("redis", _bus),
        ("redis", _saver),
    )
]


@pytest.mark.parametrize(("url", "make"), CONNECTIONS, indirect=["url"])
def test_a_lost_connection_leaves_nothing_behind(
    url: str, proxy: FaultProxy, no_collector: None, make: Callable[[str], Any]
) -> None:
    async def lose() -> None:
        connected = await make(proxy.url(url))
        proxy.cut()
        await asyncio.wait_for(asyncio.wait([connected.lost]), 10)
        await connected.close()
        del connected
        gc.collect()  # as the worker does once it has lost one

    grown, descriptors = grown_by(lose)
    print(f"{make.__name__}: {grown:.1f} MiB, {descriptors} descriptors after {TIMES} lost connections")
    assert grown < 2.5  # a read buffer of each would be 240 MiB
    assert descriptors < 10


@pytest.mark.parametrize(("url", "make"), CONNECTIONS, indirect=["url"])
def test_a_connection_that_is_refused_leaves_nothing_behind(
    url: str, proxy: FaultProxy, no_collector: None, make: Callable[[str], Any]
) -> None:
    proxy.refuse()

    async def lose() -> None:
        with pytest.raises(ConnectionLost):
            await make(proxy.url(url))
        gc.collect()  # as the worker does

    grown, descriptors = grown_by(lose)
    print(f"{make.__name__}: {grown:.1f} MiB, {descriptors} descriptors after {TIMES} refusals")
    assert grown < 2.5
    assert descriptors < 10


def test_a_child_that_has_ended_leaves_nothing_behind(no_collector: None) -> None:
    children = 40
    counts: list[tuple[int, int]] = []
    before, _ = held_memory()  # by other tests, in which nobody has asked the collector

    async def body(running: Running) -> None:
        for end in ("noop", "die") * (children // 2):
            tag = running.broker.put(end)
            await running.broker.until(lambda tag=tag: running.broker.verdict(tag) is not None)
            counts.append(held_memory())

    run_loop(body, max_tasks_per_child=1, max_child_deaths=1, timeout_s=60)
    # Five: the child, its replacement, those that are ending, and the memory in which nobody writes.
    assert max(mapped for mapped, _ in counts[5:]) - before <= 5, (before, counts)
    assert max(opened for _, opened in counts) - min(opened for _, opened in counts[:5]) <= 12, counts


def test_a_closed_worker_leaves_nothing_in_its_process() -> None:
    app = FastQ("again", broker="memory://", backend="memory://")

    @app.task(name="noop")
    def noop() -> None: ...

    process = psutil.Process()
    counts = []
    for _ in range(40):
        with worker(app):
            noop.delay().get(timeout=30)
        gc.collect()
        counts.append((process.num_fds(), process.num_threads(), process.memory_info().rss / MIB))
    first, last = counts[9], counts[-1]
    print(f"descriptors, threads, MiB: {first} after 10 workers, {last} after {len(counts)}")
    assert last[0] <= first[0] + 2
    assert last[1] <= first[1] + 2
    assert last[2] - first[2] < 3


def held_memory() -> tuple[int, int]:
    """Return how many memories that are shared with children are mapped here, and how many descriptors are open."""
    maps = Path("/proc/self/maps").read_text()
    return maps.count("memfd:fastq-"), len(os.listdir("/proc/self/fd"))
