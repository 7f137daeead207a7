"""A signal's handler that raises between a request of a child's and its reply, and what the child's next calls find."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import celery
import pytest

from tests.celery.stage import CeleryStage, Servers, opened

APP = "tests.celery.apps.struck"


@pytest.fixture(scope="module")
def stage(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CeleryStage]:
    with opened(servers, tmp_path_factory, "fastq", "redis", "redis") as stage:
        stage.start_worker("-c", "1", app=APP)
        yield stage


@pytest.mark.redis
@pytest.mark.parametrize("is_traced", [False, True], ids=["straight", "traced"])
@pytest.mark.parametrize("catches", [False, True], ids=["raises", "catches"])
@pytest.mark.parametrize("by_alarm", [False, True], ids=["limit", "alarm"])
@pytest.mark.parametrize("where", ["store", "send", "pool"])
def test_calls_after_a_strike_are_served_by_fresh_connections(
    stage: CeleryStage, where: str, by_alarm: bool, catches: bool, is_traced: bool
) -> None:
    options: dict[str, Any] = {"link": stage.client.signature("echo", [0], immutable=True)} if is_traced else {}
    if not by_alarm:
        options["soft_time_limit"] = 0.3
    call = stage.client.send_task("struck", [where, by_alarm, catches], **options)
    if catches:
        assert stage.get(call) == "caught"
    else:
        assert type(stage.error(call)).__name__ == ("Struck" if by_alarm else "SoftTimeLimitExceeded")
    for number in range(5):
        good = stage.client.send_task("echo", [number], **options)
        bad = stage.client.send_task("fail", [number], **options)
        assert stage.get(good) == [number, "PROGRESS", {"number": number}]
        assert repr(stage.error(bad)) == f"ValueError({number})"


@pytest.mark.redis
@pytest.mark.parametrize("command", ["GET", "EVALSHA"])
def test_the_limit_does_not_strike_where_the_end_of_a_task_is_recorded(stage: CeleryStage, command: str) -> None:
    signature, client = stage.client.signature, stage.client
    ends = signature("ends_in_time", [command], soft_time_limit=0.5, app=client)
    try:
        if command == "GET":
            ends.link(signature("echo", [0], immutable=True, app=client))
            assert stage.get(ends.apply_async()) == command
        else:
            # What counts the parts of a chord, and starts its body after the last one.
            body = celery.chord([ends], app=client)(signature("collect", app=client))
            assert stage.get(body) == [command]
    finally:
        stage.get(client.send_task("reset"))
    assert stage.get(client.send_task("echo", [1])) == [1, "PROGRESS", {"number": 1}]


@pytest.mark.redis
def test_a_call_that_is_struck_before_it_has_a_request_has_an_end_too(stage: CeleryStage) -> None:
    follows = stage.client.signature("echo", [0], immutable=True)
    call = stage.client.send_task("struck_early", link=follows)
    assert repr(stage.error(call)) == "Struck('early')"
    assert stage.get(stage.client.send_task("echo", [1], link=follows)) == [1, "PROGRESS", {"number": 1}]


@pytest.mark.redis
def test_what_strikes_when_a_call_has_been_answered_ends_the_child_and_no_call(stage: CeleryStage) -> None:
    [pid] = stage.worker.children()
    call = stage.client.send_task("struck_late")
    assert stage.get(call) == "answered"
    assert stage.get(stage.client.send_task("echo", [1])) == [1, "PROGRESS", {"number": 1}]
    stage.until(lambda: stage.worker.children() not in ([pid], []), "another child")
    assert stage.client.AsyncResult(call.id).result == "answered"
    assert " was due" not in stage.worker.log()
    stage.worker.wait_for_log(r"exited with 'exitcode 70'")


@pytest.mark.redis
@pytest.mark.rabbitmq
@pytest.mark.parametrize("by_alarm", [False, True], ids=["limit", "alarm"])
def test_a_connection_that_waits_for_the_rest_of_a_message_is_closed_at_once(
    servers: Servers, tmp_path_factory: pytest.TempPathFactory, by_alarm: bool
) -> None:
    with opened(servers, tmp_path_factory, "fastq", "amqp", "redis") as stage:
        stage.start_worker("-c", "1", app=APP)
        call = stage.client.send_task("struck", ["half", by_alarm, False], soft_time_limit=None if by_alarm else 1)
        assert type(stage.error(call)).__name__ == ("Struck" if by_alarm else "SoftTimeLimitExceeded")
        for number in range(3):
            assert stage.get(stage.client.send_task("echo", [number])) == [number, "PROGRESS", {"number": number}]
        assert stage.worker.stop() == 0


@pytest.mark.redis
def test_a_store_in_a_database_is_ready_before_anything_can_strike(
    servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """SQLAlchemy sets itself up at its first use, and struck in the midst of that it stores nothing any more."""
    with opened(servers, tmp_path_factory, "fastq", "redis", "database") as stage:
        stage.start_worker("-c", "1", app=APP)
        assert stage.get(stage.client.send_task("is_mapped")) is True
