"""Batches that the broker confirms late, in part or not at all: nothing that it has is sent to it a second time."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import celery
import pytest
from kombu.exceptions import OperationalError

from fastq import FastQ
from fastq.brokers.rabbitmq.publisher import ACK_HEAD, ACK_TAIL, WINDOW
from fastq.celery.sending.accelerate import accelerate
from fastq.errors import FastqError, PublishError
from fastq.wire.ids import new_id
from fastq.wire.message import encode_task
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import wait_until
from tests.support.stage import Stage, open_stage

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]


@dataclass
class Slow:
    """A broker whose answers can be held back, and an application that sends to it."""

    stage: Stage
    proxy: FaultProxy
    app: FastQ

    def send(self, count: int, *queues: str) -> None:
        """Send a batch, in turns to the queues."""
        with self.app.batch():
            for number in range(count):
                self.app.send_task("work", (number,), queue=queues[number % len(queues)])

    def arrived(self, count: int) -> None:
        wait_until(lambda: self.stage.depth() >= count, 10, lambda: TimeoutError(f"no {count} messages"))


@pytest.fixture(params=["amqp", "redis"])
def slow(
    request: pytest.FixtureRequest, tmp_path: Path, fault_proxy: Callable[[str, int], FaultProxy]
) -> Iterator[Slow]:
    stage = open_stage(request.param, request, tmp_path)
    parts = urlsplit(stage.url)
    proxy = fault_proxy(parts.hostname or "", parts.port or 0)
    app = FastQ("slow", broker=proxy.url(stage.url), backend="disabled", fastq_publish_timeout=0.5)
    app.send_task("work", (0,))
    yield Slow(stage, proxy, app)
    app.close()
    stage.close()


@pytest.mark.parametrize("count", [1, 1000])
def test_a_batch_that_is_confirmed_too_late_is_an_error_and_is_not_sent_again(slow: Slow, count: int) -> None:
    slow.proxy.hold_replies()
    with pytest.raises(PublishError, match="may still"):
        slow.send(count, "celery")
    sent = 1 + (count if slow.stage.redis is not None else min(count, 2 * WINDOW))
    slow.arrived(sent)
    assert slow.proxy.connections == 1
    slow.proxy.resume()
    slow.app.send_task("work", (0,))
    slow.arrived(sent + 1)
    assert slow.stage.depth() == sent + 1


@pytest.mark.parametrize("slow", ["amqp"], indirect=True)  # Redis answers a batch as a whole
def test_what_is_confirmed_of_a_batch_is_not_sent_again_when_the_connection_is_lost(slow: Slow) -> None:
    messages = [encode_task("work", new_id(), b"[[],{},{}]", routing_key="celery") for _ in range(3000)]
    publisher = slow.app.publisher
    slow.proxy.cut_after(len(ACK_HEAD + bytes(8) + ACK_TAIL))  # one confirm comes through, for one or for several
    with pytest.raises(PublishError, match="may or may not") as caught:
        publisher.publish(messages)
    again = caught.value.again
    assert again is not None
    assert 0 < len(again) < 3000
    assert again == messages[-len(again) :]


@pytest.mark.parametrize("slow", ["amqp"], indirect=True)  # Redis has no queues that are full
def test_what_was_refused_of_a_batch_is_sent_again_alone(slow: Slow) -> None:
    assert slow.stage.rabbitmq is not None
    options = '[{<<"max-length">>, 1}, {<<"overflow">>, <<"reject-publish">>}]'
    policy = f'<<"{slow.stage.vhost}">>, <<"short">>, <<"^short$">>, {options}, 0, <<"queues">>, <<"test">>'
    slow.stage.rabbitmq.evaluate(f"rabbit_policy:set({policy})")
    with pytest.raises(PublishError, match=r"refused \d message") as caught:
        slow.send(8, "celery", "short")
    assert slow.stage.depth() == 1 + 4
    assert caught.value.again is not None
    assert 0 < len(caught.value.again) < 4


def test_an_accelerated_application_does_not_send_again_what_was_confirmed_too_late(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"socket_timeout": 0.5} if slow.stage.redis is not None else {"confirm_publish": True}
    url = slow.proxy.url(slow.stage.url)
    app = celery.Celery("slow", broker=url, backend="disabled", set_as_current=False)
    app.conf.update(broker_transport_options=options, task_ignore_result=True)
    monkeypatch.setenv("FASTQ_PUBLISH_TIMEOUT", "0.5")
    accelerate(app)
    app.send_task("work", (0,))
    slow.proxy.hold_replies()
    with pytest.raises(OperationalError, match="may still"):
        app.send_task("work", (1,))
    slow.proxy.resume()
    slow.arrived(3)
    app.send_task("work", (2,))
    slow.arrived(4)
    assert slow.stage.depth() == 4
    app.close()


def test_a_file_that_somebody_keeps_locked_is_an_error_and_nothing_is_stored(tmp_path: Path) -> None:
    file = tmp_path / "locked.db"
    app = FastQ("locked", broker=f"sqlite:///{file}", backend="disabled", fastq_publish_timeout=0.5)
    app.send_task("work", (0,), queue="celery")
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        batch = [encode_task("work", new_id(), b"[[],{},{}]", routing_key="celery") for _ in range(100)]
        with pytest.raises(FastqError, match="lock"):
            app.publish(batch)
        assert time.monotonic() - began < 5
        other.execute("ROLLBACK")
    assert app.publisher.depth("celery") == 1
    app.send_task("work", (1,), queue="celery")
    assert app.publisher.depth("celery") == 2
    app.close()
