"""Workflows in reliable mode, where Celery's own code in a child is not enough: stock Celery loses each of these."""

from __future__ import annotations

import time
from typing import Any

import pytest
from celery import chord

from tests.celery.conftest import OpenStage, stages
from tests.support.fault_proxy import FaultProxy

UNDER_FASTQ = [kind for kind in stages(("amqp", "redis"), ("redis", "redis")) if kind.values[0][0] == "fastq"]


@pytest.mark.parametrize("kind", UNDER_FASTQ)
def test_a_chord_goes_on_whose_last_child_died_while_it_sent_the_body(kind: Any, open_stage: OpenStage) -> None:
    stage = open_stage(*kind, fastq_reliable=True)
    mark = stage.folder / "died"
    stage.start_worker(app="tests.celery.apps.deaths", env={"DEATHS_MARK": str(mark)})
    result = chord([stage.tasks.add.s(1, 2), stage.tasks.add.s(3, 4)], stage.tasks.total.s())()
    assert stage.get(result) == 10
    assert mark.exists()


@pytest.mark.parametrize("kind", UNDER_FASTQ)
def test_a_chord_waits_for_a_store_that_is_away(kind: Any, open_stage: OpenStage) -> None:
    stage = open_stage(*kind, fastq_reliable=True)
    gate = stage.gate()
    with FaultProxy("127.0.0.1", stage.servers.redis().port) as proxy:
        stage.start_worker(settings={"result_backend": proxy.url(stage.settings["result_backend"])})
        result = chord([stage.tasks.hold.s(str(gate), mark) for mark in (1, 2)], stage.tasks.keep.s())()
        stage.wait_for_notes("holding", 2)
        proxy.refuse()
        proxy.cut()
        seen = proxy.connections
        gate.touch()
        stage.until(lambda: proxy.connections >= seen + 10, "the worker has tried to connect")
        proxy.refuse(False)
        assert len(stage.get(result)) == 2


@pytest.mark.parametrize("kind", UNDER_FASTQ)
def test_a_chord_waits_for_a_broker_that_is_away(kind: Any, open_stage: OpenStage) -> None:
    confirmed = {"confirm_publish": True} if kind[1] == "amqp" else {}
    stage = open_stage(*kind, fastq_reliable=True, broker_transport_options=confirmed)
    gate = stage.gate()
    server = stage.rabbitmq or stage.servers.redis()
    with FaultProxy("127.0.0.1", server.port) as proxy:
        stage.start_worker("-c", "1", settings={"broker_url": proxy.url(stage.broker_url)})
        # The child has a connection of its own from here on: making the first one is tried for longer.
        assert stage.get(chord([stage.tasks.add.s(1, 2), stage.tasks.add.s(3, 4)], stage.tasks.total.s())()) == 10
        result = chord([stage.tasks.add.s(1, 2), stage.tasks.hold.s(str(gate))], stage.tasks.keep.s())()
        stage.wait_for_notes("holding")
        proxy.refuse()
        proxy.cut()
        gate.touch()
        time.sleep(3.0)  # by itself Celery gives up after 0.6 s
        proxy.refuse(False)
        assert stage.get(result) == [3, "opened"]
