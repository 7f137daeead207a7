"""What every publisher for event loops must do, whatever broker is behind it; and more of those of servers."""

from __future__ import annotations

import asyncio
import gc
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

import pytest
import uvloop

from fastq.brokers import open_async_publisher, open_publisher
from fastq.errors import ConnectionLost, FastqError, PublishError
from fastq.interfaces import AsyncPublisher, Publisher
from fastq.settings import Settings
from fastq.wire.message import Message
from tests.support.conformance import TIMEOUT_S, message
from tests.support.fault_proxy import Direction, FaultProxy
from tests.support.servers import free_ports

T = TypeVar("T")
#: Runs a coroutine on a new loop and returns what it returns.
Run: TypeAlias = "Callable[[Coroutine[Any, Any, Any]], Any]"

#: Chosen: a loop that takes no turn for longer was blocked by somebody.
LONGEST_TURN_S = 0.25


async def turning(work: Coroutine[Any, Any, T], longest_s: float = LONGEST_TURN_S) -> T:
    """Return what a coroutine returns, having seen that the loop went on turning meanwhile."""
    longest, turns = 0.0, 0

    async def turn() -> None:
        nonlocal longest, turns
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            now = time.monotonic()
            longest, turns, last = max(longest, now - last), turns + 1, now

    turner = asyncio.ensure_future(turn())
    try:
        return await work
    finally:
        await asyncio.sleep(0.02)  # a turn that is late is seen
        turner.cancel()
        assert turns > 0
        assert longest < longest_s, f"the loop stood still for {longest:.3f} s"


async def soon(condition: Callable[[], object]) -> None:
    """Return when a condition holds."""
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until:
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come true")


class AsyncPublisherConformance:
    """Fixtures to provide: ``url``, ``settings``."""

    @pytest.fixture(params=["asyncio", "uvloop"])
    def run(self, request: pytest.FixtureRequest) -> Iterator[Run]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield asyncio.run if request.param == "asyncio" else uvloop.run
            gc.collect()

    @pytest.fixture
    def outside(self, url: str) -> Iterator[Publisher]:
        """A publisher to the same broker, to look into the queues with."""
        publisher = open_publisher(url, Settings({}))
        yield publisher
        publisher.close()

    def opened(self, url: str, settings: Settings, **changes: Any) -> AsyncPublisher:
        return open_async_publisher(url, Settings({**settings.given(), **changes}))

    def test_published_messages_wait_in_their_queue(
        self, url: str, settings: Settings, run: Run, outside: Publisher
    ) -> None:
        async def publish() -> None:
            publisher = self.opened(url, settings)
            await publisher.declare("celery")
            await publisher.declare("celery")
            await publisher.publish([message(1)])
            await publisher.publish([message(2), message(3, "new")])
            await publisher.publish([])
            assert (outside.depth("celery"), outside.depth("new")) == (2, 1)
            await publisher.close()

        run(publish())

    def test_a_closed_publisher_opens_again(self, url: str, settings: Settings, run: Run, outside: Publisher) -> None:
        async def publish() -> None:
            publisher = self.opened(url, settings)
            for _ in range(2):
                await publisher.publish([message(1)])
                await publisher.close()
                await publisher.close()

        run(publish())
        assert outside.depth("celery") == 2

    def test_a_thousand_at_once(self, url: str, settings: Settings, run: Run, outside: Publisher) -> None:
        async def publish() -> None:
            publisher = self.opened(url, settings)
            await asyncio.gather(*(publisher.publish([message(number)]) for number in range(1000)))
            await publisher.close()

        run(publish())
        assert outside.depth("celery") == 1000

    def test_a_large_batch(self, url: str, settings: Settings, run: Run, outside: Publisher) -> None:
        async def publish() -> None:
            publisher = self.opened(url, settings)
            batches = ([message(number) for number in range(1500)] for _ in range(2))
            await asyncio.gather(*map(publisher.publish, batches))
            await publisher.close()

        run(publish())
        assert outside.depth("celery") == 3000

    def test_a_batch_with_a_message_beyond_the_limit_is_refused(
        self, url: str, settings: Settings, run: Run, outside: Publisher
    ) -> None:
        async def publish() -> None:
            strict = self.opened(url, settings, fastq_max_message_bytes=1000)
            with pytest.raises(PublishError, match="fastq_max_message_bytes allows 1000"):
                await strict.publish([message("fits"), message("x" * 1000)])
            await strict.close()

        outside.declare("celery")
        run(publish())
        assert outside.depth("celery") == 0

    def test_who_is_cancelled_disturbs_nobody(self, url: str, settings: Settings, run: Run, outside: Publisher) -> None:
        async def publish() -> None:
            publisher = self.opened(url, settings)
            await publisher.publish([message(0)])
            cancelled = [asyncio.ensure_future(publisher.publish([message(1)])) for _ in range(20)]
            others = [asyncio.ensure_future(publisher.publish([message(2)])) for _ in range(20)]
            await asyncio.sleep(0)
            for task in cancelled:
                task.cancel()
            await asyncio.gather(*others)
            assert all(isinstance(each, asyncio.CancelledError) or each is None
                       for each in await asyncio.gather(*cancelled, return_exceptions=True))  # fmt: skip
            await publisher.publish([message(3)])
            await publisher.close()

        run(publish())
        assert 22 <= outside.depth("celery") <= 42


class ServerAsyncPublisherConformance(AsyncPublisherConformance):
    """Of brokers that are servers: connections are lost, and servers are away or silent."""

    @pytest.fixture
    def proxy(self, url: str) -> Iterator[FaultProxy]:
        parts = urlsplit(url)
        with FaultProxy(parts.hostname or "", parts.port or 0) as proxy:
            yield proxy

    def distant(self, url: str, settings: Settings, proxy: FaultProxy, **changes: Any) -> AsyncPublisher:
        return self.opened(proxy.url(url), settings, **changes)

    def test_all_share_one_connection(
        self, url: str, settings: Settings, run: Run, proxy: FaultProxy, outside: Publisher
    ) -> None:
        async def publish() -> None:
            publisher = self.distant(url, settings, proxy)
            await asyncio.gather(*(publisher.publish([message(number)]) for number in range(100)))
            await publisher.publish([message(1)])
            await publisher.close()

        run(publish())
        assert proxy.connections == 1
        assert outside.depth("celery") == 101

    def test_a_connection_that_was_cut_is_replaced(
        self, url: str, settings: Settings, run: Run, proxy: FaultProxy, outside: Publisher
    ) -> None:
        async def publish() -> None:
            publisher = self.distant(url, settings, proxy)
            await publisher.publish([message(1)])
            proxy.cut()
            await asyncio.sleep(0.1)
            await publisher.publish([message(2)])
            await publisher.close()

        run(publish())
        assert (proxy.connections, outside.depth("celery")) == (2, 2)

    @pytest.mark.parametrize("count", [1, 20])
    def test_a_connection_that_is_lost_before_the_answer_leaves_the_fate_open(
        self, count: int, url: str, settings: Settings, run: Run, proxy: FaultProxy, outside: Publisher
    ) -> None:
        async def publish() -> None:
            publisher = self.distant(url, settings, proxy)
            await publisher.publish([message(0)])
            proxy.stall()
            batches = [[message(number) for number in range(count)] for _ in range(5)]
            lost = [asyncio.ensure_future(publisher.publish(batch)) for batch in batches]
            await asyncio.sleep(0.1)
            proxy.cut()
            for batch, error in zip(batches, await asyncio.gather(*lost, return_exceptions=True), strict=True):
                assert isinstance(error, PublishError), error
                assert "may or may not have been stored" in str(error)
                assert error.again is None or list(error.again) == batch
            proxy.resume()
            await publisher.publish([message(1)])
            await publisher.close()

        run(publish())
        assert outside.depth("celery") == 2

    @pytest.mark.parametrize("direction", ["to_client", "to_server"])
    def test_nothing_is_lost_or_left_waiting_wherever_the_connection_breaks(
        self, direction: Direction, url: str, settings: Settings, run: Run, proxy: FaultProxy, outside: Publisher
    ) -> None:
        """Confirmed is stored; what is to be sent again is, at most twice there, until all is confirmed."""
        stored = repeated = 0

        async def send(publisher: AsyncPublisher, batch: list[Message]) -> None:
            nonlocal stored, repeated
            while batch:
                try:
                    await publisher.publish(batch, time.monotonic() + TIMEOUT_S)
                    return
                except ConnectionLost:
                    proxy.cut_after(1 << 40, direction)  # the next connection lasts
                    await asyncio.sleep(0.01)
                except PublishError as error:
                    proxy.cut_after(1 << 40, direction)
                    again = batch if error.again is None else list(error.again)
                    repeated += len(again)
                    batch = again  # type: ignore[assignment]

        async def publish() -> None:
            nonlocal stored
            publisher = self.distant(url, settings, proxy)
            await publisher.publish([message("first")])
            for count in (1, 2, 10, 33, 100, 333, 1000, 3333):
                proxy.cut_after(count, direction)
                batches = [[message(number) for number in range(size)] for size in (1, 1, 7, 1, 40)]
                stored += sum(map(len, batches))
                await asyncio.wait_for(asyncio.gather(*(send(publisher, batch) for batch in batches)), 2 * TIMEOUT_S)
            await publisher.close()

        outside.declare("celery")
        run(publish())
        assert proxy.connections > 3
        assert stored + 1 <= outside.depth("celery") <= stored + 1 + repeated

    @pytest.mark.parametrize("count", [1, 20])
    def test_a_silent_server_ends_it_at_the_deadline_and_the_loop_goes_on(
        self, count: int, url: str, settings: Settings, run: Run, proxy: FaultProxy, outside: Publisher
    ) -> None:
        async def publish() -> None:
            publisher = self.distant(url, settings, proxy)
            await publisher.publish([message("first")])
            proxy.hold_replies()
            began = time.monotonic()
            late = [message(number) for number in range(count)]
            with pytest.raises(PublishError) as caught:
                await turning(publisher.publish(late, began + 0.4))
            assert 0.3 < time.monotonic() - began < 3
            # They may still arrive: to send them again would be to run them twice.
            assert caught.value.again == ()
            # What comes next goes by another connection, and the old one is closed when nobody waits on it.
            proxy.resume()
            await publisher.publish([message("second")])
            assert proxy.connections == 2
            await publisher.close()

        run(publish())
        assert outside.depth("celery") == 2 + count

    @pytest.mark.parametrize("count", [1, 20])
    def test_a_loop_that_stood_still_reads_the_answers_first(
        self, count: int, url: str, settings: Settings, run: Run, proxy: FaultProxy, outside: Publisher
    ) -> None:
        async def publish() -> None:
            publisher = self.distant(url, settings, proxy)
            await publisher.publish([message(0)])
            batch = [message(number) for number in range(count)]
            waiting = asyncio.ensure_future(publisher.publish(batch, time.monotonic() + 0.3))
            await asyncio.sleep(0)
            time.sleep(1.0)  # noqa: ASYNC251 - what somebody's code does
            await waiting
            await publisher.close()

        run(publish())
        assert (proxy.connections, outside.depth("celery")) == (1, 1 + count)

    def test_a_server_that_takes_connections_and_says_nothing(
        self, url: str, settings: Settings, run: Run, proxy: FaultProxy
    ) -> None:
        async def publish() -> None:
            publisher = self.distant(url, settings, proxy)
            for attempt in (publisher.publish([message(1)], time.monotonic() + 0.4),
                            publisher.declare("another", time.monotonic() + 0.8)):  # fmt: skip
                with pytest.raises(ConnectionLost):
                    await turning(attempt)
            await publisher.close()

        proxy.stall()
        began = time.monotonic()
        run(publish())
        assert time.monotonic() - began < 4

    def test_a_silent_server_ends_declaring_at_the_deadline(
        self, url: str, settings: Settings, run: Run, proxy: FaultProxy
    ) -> None:
        async def declare() -> None:
            publisher = self.distant(url, settings, proxy)
            await publisher.publish([message(1)])
            proxy.stall()
            with pytest.raises(FastqError):
                await turning(self.declare_anew(publisher, time.monotonic() + 0.4))
            proxy.resume()
            await publisher.close()

        began = time.monotonic()
        run(declare())
        assert time.monotonic() - began < 4

    async def declare_anew(self, publisher: AsyncPublisher, deadline: float) -> None:
        await publisher.declare("bound", deadline)

    def test_a_server_that_is_away_is_the_callers_error(
        self, url: str, settings: Settings, run: Run, outside: Publisher
    ) -> None:
        outside.declare("celery")
        parts = urlsplit(url)

        async def publish() -> None:
            away = self.opened(url.replace(f":{parts.port}", f":{free_ports(1)}"), settings)
            for _ in range(2):
                failed = await asyncio.gather(*(away.publish([message(1)]) for _ in range(3)), return_exceptions=True)
                assert [type(error) for error in failed] == [ConnectionLost] * 3
                assert "Is it running" in str(failed[0])
            await away.close()

        run(publish())
        assert outside.depth("celery") == 0

    def test_closing_ends_those_who_wait(self, url: str, settings: Settings, run: Run, proxy: FaultProxy) -> None:
        async def close() -> None:
            publisher = self.distant(url, settings, proxy)
            connecting = asyncio.ensure_future(publisher.publish([message(1)]))
            await asyncio.sleep(0.05)
            await publisher.close()
            with pytest.raises(ConnectionLost):
                await asyncio.wait_for(connecting, TIMEOUT_S)
            proxy.resume()
            await publisher.publish([message(1)])
            proxy.stall()
            waiting = asyncio.ensure_future(publisher.publish([message(2)]))
            await asyncio.sleep(0.05)
            await publisher.close()
            with pytest.raises(PublishError):
                await asyncio.wait_for(waiting, TIMEOUT_S)

        proxy.stall()
        run(close())
