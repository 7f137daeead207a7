"""A Redis that answers what nobody has asked, or never ends a reply: one error and a new connection, within bounds."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fastq.brokers import open_blocking_bus, open_publisher
from fastq.errors import FastqError, ResultTimeout
from fastq.results.redis.store import RedisStore
from fastq.settings import Settings
from tests.support.conformance import message
from tests.support.consumer_in_thread import Consuming
from tests.support.hostile_servers import HostileRedis
from tests.support.malformed_messages import MIB
from tests.support.servers import Redis
from tests.support.stage import Stage, empty_database, until
from tests.worker.test_malformed import memory_of

pytestmark = pytest.mark.redis

LIMIT = MIB  # fastq_max_message_bytes
FLOOD = 256 * MIB
ENDLESS = b"$1000000000000\r\n" + bytes(32 * MIB)
#: Two connections at a time with what a reply may have (16 MiB and an envelope), and noise.
GROWTH = 64 * MIB


@pytest.fixture
def proxy(redis_server: Redis) -> Iterator[HostileRedis]:
    with HostileRedis("127.0.0.1", redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def stage(redis_server: Redis, tmp_path: Path) -> Iterator[Stage]:
    stage = Stage("redis", empty_database(redis_server), tmp_path, fastq_max_message_bytes=LIMIT)
    yield stage
    stage.close()


def twice(chunk: bytes) -> bytes:
    return chunk * 2


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "twice": twice,
    "number": lambda chunk: b":1\r\n",
    "nothing": lambda chunk: b"$-1\r\n",
    "text": lambda chunk: b"$2\r\nno\r\n",
    "empty-list": lambda chunk: b"*0\r\n",
    "list-of-one": lambda chunk: b"*1\r\n*0\r\n",
    "list-of-nothing": lambda chunk: b"*3\r\n$-1\r\n$-1\r\n$-1\r\n",
    "error": lambda chunk: b"-WRONGTYPE no such thing\r\n",
    "no-reply": lambda chunk: b"?",
}


def test_a_worker_survives_false_replies_and_comes_back(stage: Stage, proxy: HostileRedis) -> None:
    """Each comes while it works; what it says then is for the next connection to put right."""
    worker = stage.start_worker(
        "-c", "1", url=proxy.url(stage.url), result_backend="disabled", broker_connection_timeout=1
    )
    for name, spoil in SPOILED.items():
        numbers, left = stage.send(20, "work", 0.005), 2

        def some(chunk: bytes, spoil: Callable[[bytes], bytes] = spoil) -> bytes:
            nonlocal left
            left -= 1
            return spoil(chunk) if left >= 0 else chunk

        proxy.spoil = some
        until(lambda: left < 0 or worker.exit_code is not None, 10, f"replies were spoilt: {name}")  # noqa: B023
        assert worker.exit_code is None, (name, worker.log()[-3000:])
        stage.wait_for(numbers, 30)
    proxy.spoil = None
    stage.wait_for_settled(20)
    assert worker.exit_code is None
    assert "Traceback" not in worker.log()
    assert "which nothing has asked for" in worker.log()


def test_what_was_taken_by_a_claim_that_was_answered_falsely_is_put_back(stage: Stage, proxy: HostileRedis) -> None:
    """The server has handed it out, and nobody has heard of it."""
    consumer = Consuming(proxy.url(stage.url), Settings({}), ("celery",), 10)
    try:
        left = 1

        def spoil(chunk: bytes) -> bytes:
            nonlocal left
            if b'"body"' not in chunk or left == 0:
                return chunk
            left = 0
            return b"-WRONGTYPE no such thing\r\n"

        proxy.spoil = spoil
        stage.send(3)
        assert "WRONGTYPE" in str(consumer.lost())
    finally:
        consumer.close()
    with Consuming(stage.url, Settings({}), ("celery",), 10) as other:
        assert len(other.rows(3)) == 3


def test_a_reply_without_end_is_given_up(stage: Stage, proxy: HostileRedis) -> None:
    """On every connection of a worker: for tasks, for news of them, for results and for remote control."""
    worker = stage.start_worker("-c", "1", url=proxy.url(stage.url), result_backend=proxy.url(stage.url))
    stage.wait_for(stage.send(1, "work"), 10)
    before = memory_of(worker.pid, "VmRSS")
    taken = proxy.flood(b"$1000000000000\r\n", bytes(64 * 1024), FLOOD)
    stage.wait_for(stage.send(1, "work"), 20)
    growth = memory_of(worker.pid, "VmHWM") - before
    print(f"taken: {[f'{each / MIB:.1f} MiB' for each in taken]}; memory grew by {growth / MIB:.1f} MiB")
    assert len(taken) >= 4
    assert growth < GROWTH
    assert "fastq_max_message_bytes" in worker.wait_for_log("Connection to broker lost: .*").group()
    assert worker.exit_code is None
    assert "Traceback" not in worker.log()


# --- programs


#: Changed by tests that wait for no time-out.
limits = {"fastq_publish_timeout": 0.3, "broker_connection_timeout": 0.3}


def settings(**more: Any) -> Settings:
    return Settings({"fastq_max_message_bytes": LIMIT, **limits, **more})


def publish(url: str) -> None:
    with closing(open_publisher(url, settings())) as publisher:
        publisher.publish([message("a")])


def publish_many(url: str) -> None:
    with closing(open_publisher(url, settings())) as publisher:
        publisher.publish([message("a"), message("b")])


def load(url: str) -> None:
    with closing(RedisStore(url, settings())) as store:
        store.load("id")


def wait(url: str) -> None:
    with closing(RedisStore(url, settings())) as store:
        store.wait("id", 0.5)


def ask(url: str) -> None:
    with closing(open_blocking_bus(url, settings())) as bus:
        list(bus.ask("ping", {}, 0.2))


def events(url: str) -> None:
    with closing(open_blocking_bus(url, settings())) as bus:
        next(bus.events())


PROGRAMS = [publish, publish_many, load, wait, ask, events]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_program_gives_up_a_reply_without_end(
    stage: Stage, proxy: HostileRedis, program: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in limits:
        monkeypatch.setitem(limits, name, 10.0)
    for first_chunk in (1, 2):  # the login's, a command's
        chunks = itertools.count(1)

        def spoil(chunk: bytes, chunks: Iterator[int] = chunks, first: int = first_chunk) -> bytes:
            return ENDLESS if next(chunks) >= first else chunk

        proxy.spoil = spoil
        with pytest.raises(FastqError) as caught:
            program(proxy.url(stage.url))
        # Who waits for a result goes on to do so, on a new connection.
        assert "fastq_max_message_bytes" in str(caught.value) or isinstance(caught.value, ResultTimeout)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_false_reply_is_an_error_of_the_servers(
    stage: Stage, proxy: HostileRedis, program: Callable[[str], None]
) -> None:
    # A list is a message of a subscription, though an odd one: nothing happens.
    for spoil in list(SPOILED.values())[1 if program is events else 0 : 4 if program is events else 6]:
        chunks = itertools.count(1)

        def later(chunk: bytes, chunks: Iterator[int] = chunks, spoil: Callable[[bytes], bytes] = spoil) -> bytes:
            return spoil(chunk) if next(chunks) == 2 else chunk

        proxy.spoil = later
        with contextlib.suppress(FastqError):
            program(proxy.url(stage.url))


def test_a_reply_that_nobody_has_asked_for_loses_no_message(
    stage: Stage, proxy: HostileRedis, caplog: pytest.LogCaptureFixture
) -> None:
    """Published behind the caller's back: what was not answered is sent again."""
    publisher = open_publisher(proxy.url(stage.url), settings(broker_transport_options={"confirm_publish": "behind"}))
    with closing(publisher):
        publisher.publish([message("a")])
        assert publisher.flush(5.0) == 0  # type: ignore[attr-defined]
        proxy.spoil = twice
        for _ in range(20):
            publisher.publish([message("b")])
        until(lambda: "which nothing has asked for" in caplog.text, 5, "it was noticed")
        proxy.spoil = None
        assert publisher.flush(5.0) == 0  # type: ignore[attr-defined]
    assert stage.depth() >= 21
