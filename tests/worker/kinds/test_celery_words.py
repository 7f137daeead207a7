"""Celery's canvas, callbacks and signals, in every kind of pool that runs a Celery application."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import celery
import pytest

from tests.support.celery_client import close_client
from tests.support.kinds import CALLS, PATIENCE_S, Field, Row, open_field, rows
from tests.support.servers import Redis
from tests.support.stage import empty_database

celery_rows = rows(lambda row: row.program == "celery")


class Canvas:
    """A field with a worker, and a client of Celery's."""

    def __init__(self, field: Field, backend: str) -> None:
        self.field = field
        self.client = celery.Celery("client", broker=field.stage.url, backend=backend, set_as_current=False)
        self.worker = field.start(result_backend=backend)

    def sign(self, task: str, *args: Any, **options: Any) -> Any:
        """Return a signature of the kind's task."""
        return self.client.signature(self.field.kind.task(task), args, **options)


@pytest.fixture(scope="module")
def canvas(
    row: Row, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, redis_server: Redis
) -> Iterator[Canvas]:
    field = open_field(row, request, tmp_path_factory.mktemp(str(row)))
    made = Canvas(field, empty_database(redis_server))
    yield made
    close_client(made.client)
    field.close()


@celery_rows
def test_chains(canvas: Canvas) -> None:
    results = [(canvas.sign("plus", n, 2) | canvas.sign("plus", 3) | canvas.sign("plus", 4)).delay() for n in range(9)]
    assert [result.get(timeout=PATIENCE_S) for result in results] == [n + 9 for n in range(9)]


@celery_rows
def test_chords(canvas: Canvas) -> None:
    header = [canvas.sign("plus", n, 1) for n in range(3 * CALLS)]
    results = [celery.chord(header, app=canvas.client)(canvas.sign("total", 100)) for _ in range(3)]
    assert [result.get(timeout=PATIENCE_S) for result in results] == [100 + sum(n + 1 for n in range(3 * CALLS))] * 3


@celery_rows
def test_groups_within_chains(canvas: Canvas) -> None:
    parallel = celery.group([canvas.sign("plus", n) for n in range(CALLS)], app=canvas.client)
    result = (canvas.sign("plus", 10) | parallel | canvas.sign("total")).delay()
    assert result.get(timeout=PATIENCE_S) == sum(10 + n for n in range(CALLS))


@celery_rows
@pytest.mark.parametrize("task", ["told", "told_more"])
def test_errbacks(canvas: Canvas, task: str) -> None:
    result = canvas.sign("fail", 7).apply_async(link_error=canvas.sign(task))
    with pytest.raises(ValueError, match="number 7"):
        result.get(timeout=PATIENCE_S)
    canvas.worker.wait_for_log(f"told of {result.id}", PATIENCE_S)


@celery_rows
def test_a_limit_calls_errbacks(canvas: Canvas) -> None:
    result = canvas.sign("stubborn", 0, 60).apply_async(link_error=canvas.sign("told"), time_limit=0.5)
    canvas.worker.wait_for_log(f"told of {result.id}", PATIENCE_S)


@celery_rows
def test_signals_know_their_calls(canvas: Canvas) -> None:
    results = [canvas.sign("work", n, 0.1).delay() for n in range(3 * CALLS)]
    assert [result.get(timeout=PATIENCE_S) for result in results] == [*range(3 * CALLS)]
    for result in results:
        canvas.worker.wait_for_log(f"signal task_postrun of {result.id} while {result.id} runs", PATIENCE_S)
        said = re.findall(rf"signal (\w+) of {result.id} while {result.id} runs", canvas.worker.log())
        assert said == ["task_prerun", "task_success", "task_postrun"]


@celery_rows
def test_a_call_that_celery_s_own_code_traces_keeps_its_limit(canvas: Canvas) -> None:
    """A callback sends it that way."""
    result = canvas.sign("stops_in_time", 1, 60).apply_async(link=canvas.sign("plus"), soft_time_limit=0.5)
    assert result.get(timeout=PATIENCE_S) == "stopped in time"
    gate = canvas.field.gate()
    limited = canvas.sign("until", 1, str(gate)).apply_async(link=canvas.sign("plus"), soft_time_limit=0.5)
    limited.get(timeout=PATIENCE_S, propagate=False)
    assert type(limited.result).__name__ == "SoftTimeLimitExceeded"


@celery_rows
def test_a_traced_call_can_be_revoked(canvas: Canvas) -> None:
    result = canvas.sign("work", 10_001, 60).apply_async(link=canvas.sign("plus"))
    canvas.field.wait_for_running([10_001])
    canvas.field.ask("revoke", task_id=result.id, terminate=True)
    result.get(timeout=PATIENCE_S, propagate=False)
    assert result.state == "REVOKED"
    assert canvas.sign("plus", 1).delay().get(timeout=PATIENCE_S) == 1
