"""What RabbitMQ refuses of messages that are sent from an event loop: whom that concerns, and whom it does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeAlias

import pytest
import uvloop

from fastq.brokers.rabbitmq.on_loop import AmqpLoopPublisher
from fastq.brokers.rabbitmq.publisher import AmqpPublisher
from fastq.errors import PublishError, SettingsError
from fastq.settings import Settings
from tests.support.conformance import TIMEOUT_S, message
from tests.support.conformance.async_publishers import soon
from tests.support.servers import RabbitMQ

pytestmark = pytest.mark.rabbitmq

Run: TypeAlias = "Callable[[Coroutine[Any, Any, Any]], Any]"
FULL = {"task_queues": [{"name": "full", "max_length": 1, "arguments": {"x-overflow": "reject-publish"}}]}


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    found: Run = request.param
    return found


@pytest.fixture
def outside(amqp_url: str) -> Iterator[AmqpPublisher]:
    publisher = AmqpPublisher(amqp_url, Settings())
    yield publisher
    publisher.close()


def test_a_message_that_no_queue_takes_is_its_senders_error_alone(
    run: Run, amqp_url: str, outside: AmqpPublisher
) -> None:
    async def publish() -> None:
        publisher = AmqpLoopPublisher(amqp_url, Settings({"task_create_missing_queues": False}))
        await publisher.declare("celery")
        lost = [message(number, "nowhere") for number in range(2)]
        outcomes = await asyncio.gather(
            publisher.publish([message(0)]),
            publisher.publish([message(1), *lost, message(2)]),
            *(publisher.publish([message(3)]) for _ in range(10)),
            return_exceptions=True,
        )
        error = outcomes.pop(1)
        assert isinstance(error, PublishError)
        assert "has no queue for 2 message(s) to nowhere" in str(error)
        assert list(error.again or ()) == lost
        assert outcomes == [None] * 11
        await publisher.close()

    run(publish())
    assert outside.depth("celery") == 13


def test_a_queue_that_was_deleted_is_declared_by_the_next_try(run: Run, amqp_url: str, outside: AmqpPublisher) -> None:
    async def publish() -> None:
        publisher = AmqpLoopPublisher(amqp_url, Settings())
        await publisher.publish([message(1)])
        outside._administer(lambda connection: connection.rpc(2, "queue.delete", queue="celery"))
        with pytest.raises(PublishError, match="no queue"):
            await publisher.publish([message(2)])
        await publisher.publish([message(3)])
        await publisher.close()

    run(publish())
    assert outside.depth("celery") == 1


def test_a_full_queue_refuses_and_says_which(run: Run, amqp_url: str, outside: AmqpPublisher) -> None:
    async def publish() -> None:
        publisher = AmqpLoopPublisher(amqp_url, Settings(FULL))
        first, second = message(1, "full"), message(2, "full")
        with pytest.raises(PublishError, match=r"refused 1 message\(s\): a queue is full") as caught:
            await publisher.publish([first, second, message(3)])
        assert list(caught.value.again or ()) == [second]
        await publisher.close()

    run(publish())
    assert (outside.depth("full"), outside.depth("celery")) == (1, 1)


def test_an_exchange_that_is_missing_is_the_error_of_who_named_it(
    run: Run, amqp_url: str, outside: AmqpPublisher
) -> None:
    """The broker closes the channel, and says nothing of the others' messages: those are to be sent again."""

    async def publish() -> None:
        publisher = AmqpLoopPublisher(amqp_url, Settings())
        await publisher.publish([message(0)])
        others = [message(number) for number in range(5)]
        wrong, *right = await asyncio.gather(
            publisher.publish([message(1, "key", exchange="missing")]),
            *(publisher.publish([each]) for each in others),
            return_exceptions=True,
        )
        assert isinstance(wrong, SettingsError)
        assert "no exchange 'missing'" in str(wrong)
        for error in right:
            assert error is None or (isinstance(error, PublishError) and error.again is None)
        await publisher.publish([message(2)])
        await publisher.close()

    run(publish())
    assert 2 <= outside.depth("celery") <= 7


def test_a_queue_with_other_arguments_is_named(run: Run, amqp_url: str, outside: AmqpPublisher) -> None:
    async def publish() -> None:
        publisher = AmqpLoopPublisher(amqp_url, Settings(FULL))
        refused = await asyncio.gather(
            *(publisher.publish([message(1, "full")]) for _ in range(3)), publisher.publish([message(1)]),
            return_exceptions=True,
        )  # fmt: skip
        assert [type(error) for error in refused[:3]] == [SettingsError] * 3
        assert "'full'" in str(refused[0])
        assert refused[3] is None
        await publisher.close()

    outside.declare("full")
    run(publish())


async def publish_until_refused(publisher: AmqpLoopPublisher) -> None:
    """Publish again and again: the alarm reaches the connections a moment after it was raised."""
    for number in range(500):
        await publisher.publish([message(number, "other")])


def test_a_broker_that_blocks_publishers_is_waited_for(
    run: Run, rabbitmq: RabbitMQ, amqp_url: str, outside: AmqpPublisher
) -> None:
    async def publish() -> None:
        publisher = AmqpLoopPublisher(amqp_url, Settings({"fastq_publish_timeout": 1.0}))
        await publisher.publish([message(0)])
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, rabbitmq.block_publishers)
        try:
            with pytest.raises(PublishError, match=r"blocks publishers .*low on memory") as caught:
                await publish_until_refused(publisher)
            assert caught.value.again == ()  # it went out before the broker said so, and waits there
            patient = AmqpLoopPublisher(amqp_url, Settings())
            first = asyncio.ensure_future(patient.publish([message(2)]))
            await soon(lambda: patient._line and patient._line.blocked)  # type: ignore[attr-defined]
            # From here on it is known before anything is sent.
            with pytest.raises(PublishError, match="for longer than fastq_publish_timeout") as caught:
                await patient.publish([message(3)], time.monotonic() + 0.2)
            assert caught.value.again is None
            second = asyncio.ensure_future(patient.publish([message(4)]))
            await asyncio.sleep(0.1)
            assert not first.done()
            assert not second.done()
        finally:
            await loop.run_in_executor(None, rabbitmq.unblock_publishers)
        await asyncio.wait_for(asyncio.gather(first, second), TIMEOUT_S)
        await patient.close()
        await publisher.close()

    run(publish())
    assert outside.depth("celery") == 3
