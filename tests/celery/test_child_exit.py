"""A child's beginning and end as tools see them: connections of its own, and code that runs before it is gone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.celery.conftest import stages

APP = "tests.celery.apps.exits"


@pytest.mark.parametrize("kind", stages(("redis", "redis")))
@pytest.mark.parametrize("method", ["workloop", "_do_exit"])
def test_code_around_billiards_worker_runs_at_the_end_of_each_child(open_stage: Any, kind: Any, method: str) -> None:
    stage = open_stage(*kind)
    worker = stage.start_worker("-c", "1", "--max-tasks-per-child", "1", app=APP, env={"EXITS_TOOL": method})
    pids = [stage.get(stage.client.send_task("ping")) for _ in range(3)]
    assert len(set(pids)) == 3
    stage.wait_for_notes("exit", 3)
    assert worker.stop() == 0
    noted = [note["pid"] for note in stage.notes("exit", method=method)]
    assert set(pids) <= set(noted)
    assert len(noted) == len(set(noted))


@pytest.mark.parametrize("kind", stages(("redis", "redis")))
def test_sentry_flushes_when_a_child_is_replaced(open_stage: Any, kind: Any) -> None:
    stage = open_stage(*kind)
    stage.start_worker("-c", "1", "--max-tasks-per-child", "1", app=APP, env={"EXITS_TOOL": "sentry"})
    stage.error(stage.client.send_task("crash"))
    (flushed,) = stage.wait_for_notes("flushed")
    assert (flushed["role"], flushed["kinds"]) == ("child", ["event"])


@pytest.mark.parametrize("kind", stages(("amqp", "redis"), ("redis", "redis"), ("amqp", "database")))
def test_each_child_has_connections_of_its_own(open_stage: Any, kind: Any) -> None:
    stage = open_stage(*kind)
    worker = stage.start_worker("-c", "2", app=APP, env={"EXITS_TOOL": "connections"})
    gate = stage.gate()
    calls = [stage.client.send_task("connections", (str(gate),)) for _ in range(2)]
    stage.wait_for_notes("holding", 2)
    gate.touch()
    pids, kept = zip(*(stage.get(call) for call in calls), strict=True)
    assert len(set(pids)) == 2
    assert kept == ("kept", "kept")
    noted = stage.notes("connections")
    assert [note["role"] for note in noted] == ["main", "child", "child"]
    for what in ("redis", "broker"):
        found = [note[what] for note in noted if note[what] is not None]
        assert len(found) == len(set(found)), what
        assert len(found) in (0, 3)
    assert {note["pid"] for note in stage.notes("after_fork", role="child")} >= set(pids)
    assert worker.stop() == 0
