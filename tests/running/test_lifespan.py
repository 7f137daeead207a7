"""What an application's lifespan surrounds: once per process, on the loop of its coroutines, until the process ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastq import FastQ
from fastq.testing import worker as worker_of
from tests.support.worker_process import WorkerProcess

START = Callable[..., WorkerProcess]
#: A lifespan of either kind, which writes down where it begins and ends.
SOURCE = """
import asyncio, os, threading
from contextlib import asynccontextmanager, contextmanager
from fastq import FastQ

def note(what):
    with open("{folder}/notes", "a") as notes:
        notes.write(f"{{what}} {{os.getpid()}}\\n")

@asynccontextmanager
async def in_a_loop(app):
    note("begin")
    {failing}
    yield asyncio.get_running_loop()
    await asyncio.sleep(0)
    note("end")

@contextmanager
def plain(app):
    note("begin")
    {failing}
    yield "plain"
    note("end")

app = FastQ("spans", broker="sqlite:///{folder}/x.db", lifespan={lifespan})

@app.task(name="plain")
def plain_task():
    return [os.getpid(), app.state is not None]

@app.task(name="awaits")
async def awaits():
    await asyncio.sleep(0)
    return [os.getpid(), app.state in ("plain", asyncio.get_running_loop())]
"""


def source(folder: Path, lifespan: str, failing: str = "") -> str:
    return SOURCE.format(folder=folder, lifespan=lifespan, failing=failing)


def notes(folder: Path) -> list[tuple[str, int]]:
    file = folder / "notes"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [(what, int(pid)) for what, pid in (line.split() for line in lines)]


def results(folder: Path, task: str, count: int = 4) -> list[list[int]]:
    client = FastQ("client", broker=f"sqlite:///{folder}/x.db")
    try:
        return [client.send_task(task).get(timeout=30) for _ in range(count)]
    finally:
        client.close()


@pytest.mark.parametrize(
    "options",
    [(), ("-P", "asyncio"), ("-P", "solo"), ("--async-processes", "0"), ("--pool-start-method", "spawn")],
    ids=" ".join,
)
def test_an_asynchronous_one_is_entered_where_coroutines_run(
    start_worker: START, tmp_path: Path, options: tuple[str, ...]
) -> None:
    worker = start_worker("-c", "1", *options, source=source(tmp_path, "in_a_loop"))
    found = results(tmp_path, "awaits")
    assert [is_same for _, is_same in found] == [True] * 4
    (pid,) = {pid for pid, _ in found}
    assert ("begin", pid) in notes(tmp_path)
    if not options:  # children of plain functions have no loop
        assert [has_state for _, has_state in results(tmp_path, "plain")] == [False] * 4
    assert worker.stop() == 0
    # A spare begins, too.
    begun = [pid for what, pid in notes(tmp_path) if what == "begin"]
    assert len(begun) == len(set(begun))
    assert sorted(pid for what, pid in notes(tmp_path) if what == "end") == sorted(begun)


@pytest.mark.parametrize(
    "options", [(), ("-P", "threads"), ("-P", "asyncio"), ("-P", "gevent"), ("-P", "solo")], ids=" ".join
)
def test_a_plain_one_is_entered_in_every_process(start_worker: START, tmp_path: Path, options: tuple[str, ...]) -> None:
    worker = start_worker("-c", "2", *options, source=source(tmp_path, "plain"))
    for task in ("plain", "awaits"):
        for pid, has_state in results(tmp_path, task):
            assert has_state
            assert ("begin", pid) in notes(tmp_path)
    assert worker.stop() == 0
    begun = [pid for what, pid in notes(tmp_path) if what == "begin"]
    assert len(begun) == len(set(begun))
    assert sorted(pid for what, pid in notes(tmp_path) if what == "end") == sorted(begun)


@pytest.mark.parametrize("lifespan", ["in_a_loop", "plain"])
@pytest.mark.parametrize("options", [(), ("-P", "solo")], ids=" ".join)
def test_one_that_fails_ends_the_worker_with_its_reason(
    start_worker: START, tmp_path: Path, lifespan: str, options: tuple[str, ...]
) -> None:
    failing = source(tmp_path, lifespan, "raise OSError('no database')")
    worker = start_worker("-c", "1", "-P", "asyncio", *options, source=failing, await_ready=False)
    assert worker.wait(60) != 0
    assert "no database" in worker.log()


def test_it_surrounds_the_calls_of_a_test(tmp_path: Path) -> None:
    scope: dict[str, FastQ] = {}
    exec(source(tmp_path, "in_a_loop"), scope)
    app = scope["app"]
    with worker_of(app):
        _, is_same = app.send_task("awaits").get(timeout=10)
        assert is_same
        assert [what for what, _ in notes(tmp_path)] == ["begin"]
    assert [what for what, _ in notes(tmp_path)] == ["begin", "end"]
