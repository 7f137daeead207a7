"""What a child has open, and that a program which a task starts with ``close_fds=False`` gets none of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastq import FastQ
from tests.support.stage import Stage, open_stage
from tests.support.worker_process import WorkerProcess

SOURCE = """
import os
from fastq import FastQ
from tests.celery.apps.children_probes import passed_on

app = FastQ("descriptors")
app.task(name="passed_on")(passed_on)

@app.task(name="nothing")
def nothing():
    return 1

@app.task(name="open_here")
def open_here():
    # Sends and waits, so that whatever that takes is open.
    sent = nothing.delay()
    try:
        sent.get(timeout=0.1, disable_sync_subtasks=False)
    except Exception as error:
        print(repr(error))
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append([int(fd), os.readlink(f"/proc/self/fd/{fd}"), os.get_inheritable(int(fd))])
        except OSError:
            pass
    return [found, passed_on()]
"""


@pytest.fixture(params=["amqp", "redis", "sqlite"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    opened = open_stage(request.param, request, tmp_path)
    yield opened
    opened.close()


def test_programs_get_none_of_a_childs_descriptors(stage: Stage, tmp_path: Path) -> None:
    folder = tmp_path / "worker"
    folder.mkdir()
    log = folder / "w.log"
    options = ["-f", str(log), "-S", str(folder / "state"), "--pidfile", str(folder / "pid")]
    worker = WorkerProcess(folder, "-c", "2", *options, source=SOURCE, env=stage.environment(), log_level="WARNING")
    stage.workers.append(worker)
    worker.start()
    client = FastQ("client", broker=stage.url, backend=stage.backend)
    found, passed = client.send_task("open_here").get(timeout=30)
    client.close()
    opened = {what for _, what, _ in found}
    assert any(what.startswith("/memfd:fastq-child") for what in opened), opened
    assert any(what.startswith("socket:") for what in opened), opened
    assert str(log) in opened
    assert [what for fd, what, inheritable in found if inheritable and fd > 2] == []
    assert passed == []
    assert worker.stop() == 0
