"""The ledger that fault tests trust: it must see what is lost and what is done twice."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from tests.support.task_ledger import Ledger, record_done, record_start


def run(path: Path, numbers: range) -> None:
    for number in numbers:
        record_start(path, number)
        record_done(path, number)


def test_nothing_is_lost_when_everything_is_done_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    run(path, range(10))
    verdict = Ledger(path).check(range(10))
    assert (verdict.lost, verdict.done_twice, verdict.started_twice, verdict.unknown) == ((), (), (), ())


def test_lost_double_and_unknown_tasks_are_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    run(path, range(3))
    run(path, range(1, 2))
    record_start(path, 3)
    record_start(path, 99)
    verdict = Ledger(path).check(range(5))
    assert verdict.lost == (3, 4)
    assert verdict.done_twice == (1,)
    assert verdict.started_twice == (1,)
    assert verdict.unknown == (99,)
    assert "2 lost (3, 4)" in str(verdict)


def test_an_empty_ledger_has_lost_everything(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "missing").check(range(2)).lost == (0, 1)


def test_records_of_several_processes_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=run, args=(path, range(first, first + 200))) for first in (0, 200, 400)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    ledger = Ledger(path)
    assert ledger.check(range(600)).lost == ()
    assert sorted(ledger.pids()) == sorted(writer.pid for writer in writers if writer.pid is not None)
