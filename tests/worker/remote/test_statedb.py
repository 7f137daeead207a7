"""What a worker remembers over a restart: a task that was revoked before does not run after it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastq.wire.ids import new_id
from tests.support.stage import Stage, open_stage


@pytest.fixture(params=["amqp", "redis"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    opened = open_stage(request.param, request, tmp_path)
    yield opened
    opened.close()


def revoke(stage: Stage, task_id: str) -> str:
    command = [sys.executable, "-m", "fastq", "-b", stage.url, "control", "-t", "3", "revoke", task_id]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def test_a_revoked_task_does_not_run_after_a_restart(stage: Stage, tmp_path: Path) -> None:
    state, task_id = str(tmp_path / "state"), new_id()
    worker = stage.start_worker("-c", "1", "-S", state)
    assert f"tasks {{'{task_id}'}} flagged as revoked" in revoke(stage, task_id)
    assert worker.stop() == 0
    worker = stage.start_worker("-c", "1", "-l", "INFO", "-S", state)
    revoked = stage.call("work", task_id=task_id)
    [last] = stage.send(1)
    stage.wait_for([last], 10)
    worker.wait_for_log(rf"Discarding revoked task: work\[{task_id}\]")
    assert revoked.id == task_id
    assert stage.ledger.started() == {last: 1}
    assert worker.stop() == 0


def test_a_state_file_of_no_use_ends_the_worker_with_the_remedy(stage: Stage, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.write_text("not a database", encoding="utf-8")
    worker = stage.start_worker("-c", "1", "-S", str(state), await_ready=False)
    assert worker.wait() == 78
    assert "cannot be used" in worker.log()
    assert "--statedb" in worker.log()
