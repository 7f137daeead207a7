"""Text from outside in the log of a Celery application's worker: it has no line of its own there.

Stock Celery writes it as it comes.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.celery.conftest import OpenStage, stages
from tests.worker.test_foreign_text import EVIL, assert_harmless

UNDER_FASTQ = [kind for kind in stages(("amqp", "redis"), ("redis", "redis")) if kind.values[0][0] == "fastq"]


@pytest.mark.parametrize("kind", UNDER_FASTQ)
def test_no_message_writes_a_line_of_its_own_in_the_log(kind: Any, open_stage: OpenStage) -> None:
    stage = open_stage(*kind)
    worker = stage.start_worker(log_level="DEBUG")
    tasks = stage.tasks
    tasks.add.apply_async((1, 2), task_id=EVIL)
    tasks.add.apply_async((1, "x"), task_id=f"{EVIL}2")
    tasks.add.apply_async((1, 2), task_id=f"{EVIL}3", link=tasks.double.s())  # through Celery's tracer
    tasks.add.apply_async((1, "x"), task_id=f"{EVIL}4", link_error=tasks.error_by_id.s())
    tasks.keep.apply_async((EVIL,), task_id=f"{EVIL}5")
    tasks.add.apply_async((1, 2), task_id=f"{EVIL}6", expires=-1)
    stage.client.send_task(EVIL, (1,))
    stage.client.control.revoke(f"{EVIL}7")
    stage.client.control.broadcast(EVIL, arguments={"argument": EVIL})
    assert stage.get(tasks.add.delay(1, 2)) == 3
    stage.wait_for_notes("error_by_id")
    for words in ("received", "succeeded", "raised unexpected", "unregistered", "Discarding", "flagged as revoked"):
        worker.wait_for_log(words)
    assert_harmless(worker.log())
