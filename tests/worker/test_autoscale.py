"""A pool that grows with what waits and shrinks again, and bounds that remote control changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastq.errors import SettingsError
from fastq.worker.autoscale import Autoscaler
from tests.support.stage import Stage, open_stage, until


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    opened = open_stage("sqlite", request, tmp_path)
    yield opened
    opened.close()


def test_the_pool_grows_with_the_work_and_shrinks_when_there_is_none(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOSCALE_KEEPALIVE", "1")
    worker = stage.start_worker("--autoscale=4,1", "-l", "INFO")
    assert len(worker.children()) == 1
    numbers = stage.send(8, "work", 1.5)
    until(lambda: len(worker.children()) == 4, 10, "four children")
    stage.wait_for(numbers, 20)
    until(lambda: len(worker.children()) == 1, 15, "one child")
    assert stage.verdict("growing and shrinking").lost == ()
    assert "Scaling up 3 processes." in worker.log()
    assert "Scaling down" in worker.log()
    assert worker.stop() == 0


class Counted:
    """A pool and a core that are numbers."""

    def __init__(self, size: int, load: int = 0) -> None:
        self.size = size
        self.load = load

    def grow(self, n: int = 1) -> None:
        self.size += n

    def shrink(self, n: int = 1) -> None:
        self.size -= n


def test_the_bounds_are_kept() -> None:
    pool = Counted(2, load=100)
    scaler = Autoscaler(pool, pool, (5, 2))
    scaler.step()
    assert pool.size == 5
    assert scaler.set(3, None) == (3, 2)
    assert pool.size == 3
    assert scaler.set(8, 6) == (8, 6)
    assert pool.size == 6


@pytest.mark.parametrize(("most", "least"), [(2, 3), (0, 0), (None, -1), (None, 9)])
def test_bounds_without_sense_are_refused_and_change_nothing(most: int | None, least: int | None) -> None:
    pool = Counted(2)
    scaler = Autoscaler(pool, pool, (4, 1))
    with pytest.raises(ValueError, match="expected 0 <= min <= max"):
        scaler.set(most, least)
    assert (scaler.max, scaler.min, pool.size) == (4, 1, 2)


def test_a_keepalive_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOSCALE_KEEPALIVE", "soon")
    with pytest.raises(SettingsError, match="AUTOSCALE_KEEPALIVE is 'soon'; expected seconds"):
        Autoscaler(Counted(1), Counted(1), (2, 1))
