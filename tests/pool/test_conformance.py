"""Every pool passes the same suite: the worker's own, and a toy as another package would bring it."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastq import FastQ
from fastq.errors import SettingsError
from fastq.pool import POOL_NAMES, PREFORK, SOLO, ChildMain, ChildSpec, PoolKind, find_pool
from fastq.pool.starter import start_starter
from fastq.pool.zygote import Zygote
from fastq.testing import worker
from tests.support.conformance.pools import PoolConformance
from tests.support.worker_process import WorkerProcess
from tests.toys import toy_pool


class TestPrefork(PoolConformance):
    kind = PREFORK


def spawned(main: ChildMain) -> Zygote:
    return start_starter(
        [ChildSpec("tests.support.core_with_children:main_of", {"place": f"{main.__module__}:{main.__name__}"})]
    )


class TestSpawned(PoolConformance):
    kind = PoolKind(("spawned",), spawned, PREFORK.pool)


class TestSolo(PoolConformance):
    kind = SOLO
    has_children = False


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
        ("puddle", f"no pool is known by the name 'puddle'; known: {', '.join(POOL_NAMES)}, module:NAME"),
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


def test_a_pool_in_the_folder_of_the_application_is_found(tmp_path: Path) -> None:
    """By the installed command, which has no folder of the user's on its path."""
    (tmp_path / "toypool.py").write_text(Path(toy_pool.__file__).read_text(encoding="utf-8"))
    (tmp_path / "proj.py").write_text(f"from fastq import FastQ\napp = FastQ(broker='sqlite:///{tmp_path}/x.db')\n")
    command = [Path(sys.executable).with_name("fastq"), "-A", "proj", "worker", "-P", "toypool:POOL", "-c", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert any("ready." in line for line in worker.stdout)
        worker.terminate()
    assert worker.returncode == 0


def test_a_pool_that_nobody_knows_is_a_setting_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "proj.py").write_text("from fastq import FastQ\napp = FastQ(broker='memory://')\n")
    command = [sys.executable, "-m", "fastq", "-A", "proj", "worker", "-P", "puddle"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 78
    assert "no pool is known by the name 'puddle'" in done.stderr
