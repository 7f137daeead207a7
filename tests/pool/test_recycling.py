"""Children are replaced by number of tasks and by memory, with nothing lost and nothing run twice."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stage import Stage, open_stage
from tests.support.worker_process import has_ended

pytestmark = pytest.mark.rabbitmq


@pytest.fixture(params=["amqp", "sqlite"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    opened = open_stage(request.param, request, tmp_path)
    yield opened
    opened.close()


def test_2000_tasks_with_50_per_child_lose_nothing_and_no_child_runs_more(stage: Stage) -> None:
    worker = stage.start_worker("-c", "2", "--max-tasks-per-child", "50")
    stage.wait_for(stage.send(2000), 30)
    stage.wait_for_settled()
    verdict = stage.verdict("2,000 tasks, 50 per child")
    assert not verdict.lost
    assert not verdict.started_twice
    per_pid = Counter(entry.pid for entry in stage.ledger.entries() if entry.what == "done")
    print(f"{len(per_pid)} children, at most {max(per_pid.values())} tasks in one")
    assert max(per_pid.values()) <= 50
    assert len(per_pid) >= 40
    # Replaced one after another and in both slots, not all at the end.
    assert set(stage.ledger.pids()) == set(per_pid)
    assert worker.stop() == 0
    worker.wait_for_no_leftovers()
    assert "exited with" not in worker.log()


def test_a_child_that_has_grown_is_replaced_after_its_task(stage: Stage) -> None:
    worker = stage.start_worker("-c", "1", "--max-memory-per-child", str(150 << 10))
    pids = [stage.call("grow", size).get(timeout=10) for size in (1, 1, 200, 1, 200, 1)]
    print(f"children in order: {pids}")
    assert pids[0] == pids[1] == pids[2], "a small child was replaced"
    assert pids[2] != pids[3], "a child of 200 MiB went on"
    assert pids[3] == pids[4] != pids[5]
    verdict = stage.verdict("150 MiB per child")
    assert not verdict.lost
    assert not verdict.started_twice
    assert worker.stop() == 0


def test_the_replacement_is_ready_before_the_old_child_retires(stage: Stage) -> None:
    worker = stage.start_worker("-c", "1", "--max-tasks-per-child", "5")
    # The spare exists from the start: one slot, two children.
    assert len(worker.children()) == 2
    stage.wait_for(stage.send(60, "work", 0.01), 20)
    starts = [entry for entry in stage.ledger.entries() if entry.what == "start"]
    gaps = [
        later.at_unix - earlier.at_unix for earlier, later in itertools.pairwise(starts) if earlier.pid != later.pid
    ]
    print(f"{len(gaps)} changes of child, gaps {min(gaps) * 1e3:.1f} to {max(gaps) * 1e3:.1f} ms between starts")
    assert len(gaps) >= 11
    # Forking and starting a child takes longer than this; a gap of a task and a hand-over does not.
    assert sorted(gaps)[len(gaps) // 2] < 0.1


def test_without_a_spare_a_child_is_replaced_when_it_has_ended(stage: Stage) -> None:
    """For children that hold a port, a lock or a GPU: there are never two of a slot."""
    worker = stage.start_worker("-c", "1", "--max-tasks-per-child", "5", fastq_keeps_spare=False)
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, sum(not has_ended(pid) for pid in worker.children()))

    numbers = stage.send(40, "work", 0.05)
    deadline = time.monotonic() + 30
    while not set(numbers) <= stage.ledger.done().keys() and time.monotonic() < deadline:
        look()
    stage.wait_for_settled()
    look()
    verdict = stage.verdict("40 tasks, 5 per child, no spare")
    assert not verdict.lost
    assert not verdict.started_twice
    per_pid = Counter(entry.pid for entry in stage.ledger.entries() if entry.what == "done")
    assert set(per_pid.values()) == {5}
    assert most == 1
    assert worker.stop() == 0
