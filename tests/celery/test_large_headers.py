"""Messages whose headers are large: they run, or their caller is told why not; children and worker go on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.celery.test_children import APPS, ask, send

KINDS = [
    pytest.param("amqp", application, id=f"amqp-{application}", marks=[pytest.mark.rabbitmq, pytest.mark.redis])
    for application in APPS
] + [pytest.param("redis", application, id=f"redis-{application}", marks=pytest.mark.redis) for application in APPS]

#: RabbitMQ takes one frame of headers, 128 KiB; Redis takes all that fits a message.
LARGEST = {"amqp": 120 << 10, "redis": 3 << 20}


@pytest.mark.parametrize(("broker", "application"), KINDS)
def test_a_call_with_large_headers_runs(open_stage: Any, broker: str, application: str) -> None:
    stage = open_stage("fastq", broker, "redis")
    worker = stage.start_worker("-c", "1", app=APPS[application])
    pid = ask(stage, "identity")["pid"]
    size = LARGEST[broker]
    for headers in ({"big": "x" * size}, {"many": ["x"] * (size // 8)}):
        assert ask(stage, "identity", headers=headers)["pid"] == pid
    if broker == "redis":
        # What happens to the call is told as for any other: here a limit that the main process records.
        error = stage.error(send(stage, "sleep", 60, time_limit=0.5, headers={"big": "x" * size}))
        assert type(error).__name__ == "TimeLimitExceeded"
    assert "internal error" not in worker.log()


@pytest.mark.redis
@pytest.mark.parametrize("application", APPS)
def test_large_headers_that_cannot_be_read_are_refused_and_the_caller_is_told(
    open_stage: Any, application: str
) -> None:
    stage = open_stage("fastq", "redis", "redis")
    worker = stage.start_worker("-c", "1", app=APPS[application])
    pid = ask(stage, "identity")["pid"]
    deep: Any = "x" * LARGEST["redis"]
    for _ in range(12):
        deep = [deep]
    call = send(stage, "identity", headers={"deep": deep})
    if application == "fastq":  # headers are read when a task asks for them
        assert stage.get(call)["pid"] == pid
    else:
        assert "bytes of AMQP fields; the limit is" in str(stage.error(call))
        worker.wait_for_log("Rejected malformed message: class=properties")
    assert ask(stage, "identity")["pid"] == pid
