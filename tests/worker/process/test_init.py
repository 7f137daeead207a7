"""A worker as the first process of a container, where orphans come to it: they are waited for, and nothing else."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests import ROOT
from tests.support.stage import until

PR_SET_CHILD_SUBREAPER = 36
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a process the first one of its kind")

SHOP = """
import os, subprocess, time
from fastq import FastQ

app = FastQ("shop", broker="sqlite:///shop.db", backend="sqlite:///shop.db")

@app.task(name="orphans")
def orphans(count):
    for _ in range(count):
        # The shell ends at once; what it has started ends later, with nobody to wait for it.
        subprocess.run(["/bin/sh", "-c", "sleep 0.2 & setsid sleep 0.2 &"], check=True)
    failed = subprocess.Popen(["/bin/sh", "-c", "exit 3"], start_new_session=True)
    time.sleep(1)
    return failed.wait()
"""


class Container:
    """A worker that orphans come to; the process that got them and its tree, seen from outside."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.log = folder / "w.log"
        self.folder = folder
        (folder / "shop.py").write_text(SHOP)
        command = [sys.executable, "-m", "fastq", "-A", "shop", "worker", "-c", "1", "-l", "INFO"]
        before: Callable[[], object] | None = None
        if kind == "first":
            command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *command]
        else:
            prctl = ctypes.CDLL(None).prctl

            def before() -> object:
                return prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=before,
                start_new_session=True,
            )
        until(lambda: "ready." in self.log.read_text() or self.process.poll() is not None, 40, "worker is ready")
        outer = psutil.Process(self.process.pid)
        self.first = outer.children()[0] if kind == "first" else outer

    def zombies(self) -> list[str]:
        return [each.name() for each in self.first.children(recursive=True) if each.status() == psutil.STATUS_ZOMBIE]


@pytest.fixture(params=[pytest.param("first", marks=needs_root), "subreaper"])
def container(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Container]:
    started = Container(tmp_path, request.param)
    yield started
    if started.process.poll() is None:
        for process in reversed(started.first.children(recursive=True)):
            process.kill()
        started.process.kill()
        started.process.wait(10)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_orphans_are_waited_for_and_signals_handed_on(
    container: Container, monkeypatch: pytest.MonkeyPatch, signum: int
) -> None:
    from fastq import FastQ

    monkeypatch.chdir(container.folder)
    client = FastQ("client", broker="sqlite:///shop.db", backend="sqlite:///shop.db")
    assert client.send_task("orphans", (3,)).get(timeout=40) == 3  # the program's own exit status
    client.close()
    until(lambda: "sleep" not in container.zombies(), 5, "orphans are waited for")
    assert container.zombies() == []
    container.first.send_signal(signum)
    assert container.process.wait(40) == 0
    log = container.log.read_text()
    assert log.count("Warm shutdown") >= 1
    assert "Cold shutdown" not in log


def test_it_ends_as_the_worker_does(container: Container) -> None:
    (worker,) = container.first.children()
    worker.send_signal(signal.SIGQUIT)
    assert container.process.wait(40) == 1
