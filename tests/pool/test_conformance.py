"""Every pool passes the same suite: the worker's own, and a toy as another package would bring it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path

import pytest

from fastq import FastQ
from fastq.errors import SettingsError
from fastq.pool import PREFORK, find_pool
from fastq.testing import worker
from tests.support.conformance.pools import PoolConformance
from tests.support.worker_process import WorkerProcess
from tests.toys import toy_pool


class TestPrefork(PoolConformance):
    kind = PREFORK


class TestToyPool(PoolConformance):
    kind = toy_pool.POOL


def test_a_pool_is_found_by_module_and_name_and_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_pool("tests.toys.toy_pool:POOL") is toy_pool.POOL
    assert find_pool("processes") is PREFORK
    (tmp_path / "toy-1.0.dist-info").mkdir()
    (tmp_path / "toy-1.0.dist-info" / "METADATA").write_text("Name: toy\nVersion: 1.0\n")
    (tmp_path / "toy-1.0.dist-info" / "entry_points.txt").write_text("[fastq.pools]\ntoy = tests.toys.toy_pool:POOL\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_pool("toy") is toy_pool.POOL


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("puddle", "no pool is known by the name 'puddle'; known: prefork, processes, module:NAME"),
        ("tests.toys.toy_pool:LAKE", "'tests.toys.toy_pool:LAKE' cannot be imported"),
        ("tests.toys.no_pool:POOL", "'tests.toys.no_pool:POOL' cannot be imported"),
        ("tests.toys.toy_pool:ToyPool", "'tests.toys.toy_pool:ToyPool' is a type; expected a fastq.pool.PoolKind"),
    ],
)
def test_a_pool_that_is_none_is_an_error_that_says_why(name: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        find_pool(name)


def test_a_worker_runs_its_tasks_on_a_pool_that_is_named(tmp_path: Path) -> None:
    app = FastQ("toys", broker=f"sqlite:///{tmp_path / 'toys.db'}")
    double = app.task(name="double")(operator.neg)
    with worker(app, pool="tests.toys.toy_pool:POOL", concurrency=2) as running:
        assert type(running.life.pool) is toy_pool.ToyPool
        assert [double.delay(number).get(timeout=20) for number in range(5)] == [0, -1, -2, -3, -4]
    app.close()


def test_a_worker_says_which_pool_it_has(start_worker: Callable[..., WorkerProcess], tmp_path: Path) -> None:
    source = f"from fastq import FastQ\napp = FastQ(broker='sqlite:///{tmp_path}/x.db')\n"
    started = start_worker("-P", "tests.toys.toy_pool:POOL", "-c", "1", source=source)
    assert "concurrency: 1 (tests.toys.toy_pool:POOL)" in started.log()
    assert started.stop() == 0
