"""What RabbitMQ's queues end of when a message is dead-lettered: here no message can make a worker do that to them.

A queue that cannot add to a message's ``x-death`` ends, comes back with the message, and ends of it again; after a few
times it stays away, with all that is in it. Seen with RabbitMQ 3.10, classic and quorum queues, whoever rejects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastq.wire.message import Message, encode_properties
from tests.support.attacked_worker import Attacked, Program
from tests.support.malformed_messages import headers
from tests.support.servers import RabbitMQ
from tests.support.stage import QUEUE, Kind, open_stage, until

pytestmark = pytest.mark.rabbitmq

DEATH = {"count": 1, "reason": "rejected", "queue": QUEUE, "exchange": "", "routing-keys": [QUEUE]}
FATAL: list[Any] = [[7], [None], [DEATH, "x"], [{**DEATH, "count": "1"}], [{**DEATH, "count": 1.5}]]


def message(**changes: Any) -> Message:
    """Return a message that outlives its queue's process."""
    found = {"content_type": "application/json", "content_encoding": "utf-8", "delivery_mode": 2}
    return Message("", QUEUE, encode_properties({**found, "headers": headers(**changes)}), b"[[1000000], {}, {}]")


@pytest.mark.parametrize("program", ["fastq", "celery"])
@pytest.mark.parametrize("kind", ["amqp", "quorum"])
def test_no_message_ends_its_queue_by_becoming_a_dead_letter(
    kind: Kind, program: Program, rabbitmq: RabbitMQ, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    stage = open_stage(kind, request, tmp_path)
    before = rabbitmq.log().count("crasher:")
    try:
        attacked = Attacked(stage, program)
        for deaths in FATAL:
            later = {"eta": "2999-01-01T00:00:00+00:00"}
            for change in ({}, later, {"task": 7}, {"task": "nobody.knows"}, {"timelimit": 5}):
                stage.publish([message(**change, **{"x-death": deaths})])
        attacked.send_good(10)
        until(lambda: stage.depth() == 0, 5, "all are settled")
        assert stage.dead_letters(0) == []
        stage.publish([message(**{"task": "nobody.knows", "x-death": [DEATH]})])
        assert len(stage.dead_letters()) == 1
        assert attacked.worker.log().count("class=x-death") == 3 * len(FATAL)
        assert rabbitmq.log().count("crasher:") == before
    finally:
        stage.close()
