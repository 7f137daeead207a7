"""Children from a fresh interpreter: when a worker chooses them by itself, what they need, and what they cost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from fastq import FastQ
from fastq.errors import SettingsError
from fastq.pool import ChildSpec
from fastq.pool.starter import command_of, start_starter
from fastq.pool.zygote import Exited, Spawned, Zygote
from fastq.testing import worker as worker_of
from fastq.worker.place import place_of
from tests.support.stage import Stage, open_stage, until
from tests.support.worker_process import ROOT, WorkerProcess

START = Callable[..., WorkerProcess]
SPAWN = ("--pool-start-method", "spawn")
SOURCE = """
import multiprocessing, os, sys, threading, time
from fastq import FastQ

app = FastQ("spawned", broker="sqlite:///{folder}/x.db")
imported_by = os.getpid()

@app.task(name="where")
def where():
    print("said by a task")
    return [os.getpid(), os.getppid(), imported_by, [thread.name for thread in threading.enumerate()]]

"""


@pytest.fixture(params=["redis", "sqlite"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    opened = open_stage(request.param, request, tmp_path)
    yield opened
    opened.close()


def client_of(folder: Path) -> FastQ:
    return FastQ("client", broker=f"sqlite:///{folder}/x.db")


def where(folder: Path) -> tuple[int, int, int, list[str]]:
    """Return a child's number, its parent's, that of the process that has imported the application, and its threads."""
    client = client_of(folder)
    try:
        pid, parent, importer, threads = client.send_task("where").get(timeout=30)
        return pid, parent, importer, threads
    finally:
        client.close()


# --- in a worker


def test_a_child_imports_the_application_itself_and_speaks_with_its_name(start_worker: START, tmp_path: Path) -> None:
    # What multiprocessing does is another matter.
    source = SOURCE.format(folder=tmp_path) + "multiprocessing.set_start_method('forkserver')\n"
    worker = start_worker("-c", "2", *SPAWN, source=source)
    pid, parent, importer, _ = where(tmp_path)
    assert pid == importer
    assert psutil.Process(parent).name() == "fastq-starter"
    assert psutil.Process(parent).ppid() == worker.pid
    assert os.getpgid(pid) == pid
    worker.wait_for_log(r"WARNING/ForkPoolWorker-\d\] said by a task")
    assert worker.stop() == 0
    worker.wait_for_no_leftovers()
    assert "Traceback" not in worker.log()


def test_the_setting_says_the_same_and_the_option_goes_before_it(start_worker: START, tmp_path: Path) -> None:
    source = SOURCE.format(folder=tmp_path) + "app.conf.worker_pool_start_method = 'spawn'\n"
    worker = start_worker("-c", "1", source=source)
    pid, _, importer, _ = where(tmp_path)
    assert pid == importer
    assert worker.stop() == 0
    worker = start_worker("-c", "1", "--pool-start-method", "forkserver", source=source)
    _, _, importer, _ = where(tmp_path)
    assert importer == worker.pid


def test_a_child_that_is_killed_is_replaced_and_nothing_is_lost(stage: Stage) -> None:
    worker = stage.start_worker("-c", "2", *SPAWN)
    gate = stage.folder / "gate"
    stage.call("until", str(gate))
    stage.ledger.wait_for_starts(1, 10)
    os.kill(next(iter(stage.ledger.pids())), signal.SIGKILL)
    until(lambda: stage.ledger.started()[stage.sent[0]] == 2, 20, "it runs again")
    gate.touch()
    stage.wait_for([*stage.send(50), stage.sent[0]], 30)
    stage.wait_for_settled()
    assert not stage.verdict("a spawned child is killed").lost
    worker.wait_for_log(r"exited with .*signal 9 \(SIGKILL\)")
    assert worker.stop() == 0
    worker.wait_for_no_leftovers()


def test_children_are_recycled_after_so_many_tasks(stage: Stage) -> None:
    worker = stage.start_worker("-c", "2", "--max-tasks-per-child", "10", *SPAWN)
    stage.wait_for(stage.send(60), 60)
    stage.wait_for_settled()
    verdict = stage.verdict("60 tasks, 10 per spawned child")
    assert not verdict.lost
    assert not verdict.started_twice
    assert len(set(stage.ledger.pids())) >= 6
    assert worker.stop() == 0
    assert "exited with" not in worker.log()


def test_without_the_starter_the_worker_and_its_children_end(start_worker: START, tmp_path: Path) -> None:
    worker = start_worker("-c", "2", *SPAWN, source=SOURCE.format(folder=tmp_path))
    worker.tree()
    (starter,) = (each for each in psutil.Process(worker.pid).children() if each.name() == "fastq-starter")
    starter.kill()
    assert worker.wait() == 70
    worker.wait_for_no_leftovers(2)


def test_a_signal_to_all_processes_does_not_end_a_child_that_starts(start_worker: START, tmp_path: Path) -> None:
    """As systemd sends TERM to a unit: it is the main process that stops."""
    gate = tmp_path / "gate"
    source = SOURCE.format(folder=tmp_path) + (
        "if 'fastq.pool.spawned' in sys.modules:\n"
        f"    open('{tmp_path}/begun', 'w').close()\n"
        f"    while not os.path.exists('{gate}'): time.sleep(0.01)\n"
    )
    worker = start_worker("-c", "1", *SPAWN, source=source, await_ready=False)
    until((tmp_path / "begun").exists, 20, "the child imports")
    for pid in worker.tree()[1:]:
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(pid, signum)
    gate.touch()
    worker.wait_for_log(r"ready\.", 20)
    pid, _, importer, _ = where(tmp_path)
    assert pid == importer
    assert worker.stop() == 0
    assert "before it was ready" not in worker.log()


# --- chosen by the worker

THREAD = "threading.Thread(target=time.sleep, args=(600,), daemon=True, name='exporter').start()\n"
AT_IMPORT = THREAD
HOOK = f"def hook(): {THREAD}os.register_at_fork(after_in_child=hook)\n"


@pytest.mark.parametrize(
    ("starts", "how"),
    [(AT_IMPORT, "its import has started a thread"), (HOOK, "hooks of os.register_at_fork start a thread")],
    ids=["import", "hook"],
)
def test_an_application_that_starts_threads_is_spawned(
    start_worker: START, tmp_path: Path, starts: str, how: str
) -> None:
    worker = start_worker("-c", "2", source=SOURCE.format(folder=tmp_path) + starts)
    pid, _, importer, threads = where(tmp_path)
    assert pid == importer
    assert threads == ["MainThread", *(["exporter"] if starts is AT_IMPORT else [])]
    told = [line for line in worker.log().splitlines() if "('exporter')" in line]
    assert len(told) == 1
    assert f"WARNING/MainProcess] children of this application are spawned, each as a fresh Python, as {how}" in told[0]
    assert "('exporter')" in told[0]
    assert "--pool-start-method fork" in told[0]
    assert [each.name() for each in psutil.Process(worker.pid).children()] == ["fastq-starter"]
    assert worker.stop() == 0
    worker.wait_for_no_leftovers()


@pytest.mark.parametrize("starts", [AT_IMPORT, HOOK], ids=["import", "hook"])
def test_who_asks_for_forks_gets_them_with_a_warning(start_worker: START, tmp_path: Path, starts: str) -> None:
    worker = start_worker("-c", "1", "--pool-start-method", "fork", source=SOURCE.format(folder=tmp_path) + starts)
    _, _, importer, _ = where(tmp_path)
    assert importer == worker.pid
    worker.wait_for_log(r"WARNING/MainProcess\] the process has 1 more thread \('exporter'\) while it forks")
    assert "are spawned" not in worker.log()


def test_who_asks_for_spawned_children_is_told_nothing(start_worker: START, tmp_path: Path) -> None:
    worker = start_worker("-c", "1", *SPAWN, source=SOURCE.format(folder=tmp_path) + AT_IMPORT)
    pid, _, importer, _ = where(tmp_path)
    assert pid == importer
    assert "('exporter')" not in worker.log()


def test_a_thread_that_has_ended_is_none(start_worker: START, tmp_path: Path) -> None:
    ended = "thread = threading.Thread(target=print)\nthread.start()\nthread.join()\n"
    worker = start_worker("-c", "1", source=SOURCE.format(folder=tmp_path) + ended)
    _, _, importer, _ = where(tmp_path)
    assert importer == worker.pid


# --- what can be spawned

PROGRAM = """
import sys
from fastq import FastQ
from fastq.testing import worker

app = FastQ("program", broker="memory://", backend="memory://")

@app.task
def add(a, b):
    return [a + b, __name__]

def main():
    with worker(app, pool="prefork", pool_start_method="spawn"):
        print(add.name, *add.delay(1, 2).get(timeout=30), flush=True)

"""


def run_program(folder: Path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM + text)
    command = [sys.executable, *(words or ["program.py"])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("words", [["program.py"], ["-m", "program"]], ids=" ".join)
def test_a_program_that_starts_the_worker_is_run_anew_under_another_name(tmp_path: Path, words: list[str]) -> None:
    done = run_program(tmp_path, 'if __name__ == "__main__":\n    main()\n', *words)
    assert (done.stdout, done.returncode) == ("program.add 3 __mp_main__\n", 0), done.stderr


def test_a_program_that_does_so_in_any_case_is_told_what_is_wrong(tmp_path: Path) -> None:
    done = run_program(tmp_path, "main()\n")
    assert done.returncode != 0
    assert "put that under if __name__ == " in done.stderr


def test_an_application_that_no_module_holds_cannot_be_spawned() -> None:
    app = FastQ("nowhere", broker="memory://")
    with pytest.raises(SettingsError, match=r"no module holds the application .* Make it a variable of a module"):
        worker_of(app, pool="prefork", pool_start_method="spawn").__enter__()


def test_an_application_is_found_where_a_command_has_found_it(monkeypatch: pytest.MonkeyPatch) -> None:
    app = FastQ("held", broker="memory://")
    here = sys.modules[__name__]
    monkeypatch.setattr(here, "holder", type("Holder", (), {"app": app}), raising=False)
    assert place_of(app, f"{__name__}:holder.app").find() is app
    monkeypatch.setattr(here, "held", app, raising=False)
    assert place_of(app, "elsewhere") == place_of(app) == place_of(app, __name__)
    assert place_of(app).find() is app


def test_a_pool_that_cannot_spawn_says_so(tmp_path: Path) -> None:
    (tmp_path / "proj.py").write_text(f"from fastq import FastQ\napp = FastQ(broker='sqlite:///{tmp_path}/x.db')\n")
    command = [sys.executable, "-m", "fastq", "-A", "proj", "worker", "-P", "tests.toys.toy_pool:POOL", *SPAWN]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 78
    assert "the pool 'tests.toys.toy_pool:POOL' does not spawn its children" in done.stderr


# --- the starter alone

EARLY = """
import os, socket, threading
from socket import create_connection

def make(seconds=0):
    def child_main(sock, shared, number, group):
        with socket.socket(fileno=sock) as told:
            told.sendall(f"{create_connection.__module__} {threading.Thread.start.__module__} {number}".encode())
        return 7
    return child_main
"""


def child_of(zygote: Zygote, number: int = 5, timeout_s: float = 20) -> tuple[bytes, Exited]:
    """Return what a child has said on its socket, and how it has ended."""
    sock, reader = zygote.spawn(1, number)
    try:
        sock.settimeout(timeout_s)
        said = sock.recv(1000)
        reports: list[object] = []
        until(lambda: reports.extend(zygote.reports()) or len(reports) == 2, timeout_s, "its end")  # type: ignore[func-returns-value]
        assert isinstance(reports[0], Spawned)
        assert isinstance(reports[1], Exited)
        return said, reports[1]
    finally:
        sock.close()
        del reader


@pytest.fixture
def early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "early.py").write_text(EARLY)
    monkeypatch.syspath_prepend(tmp_path)
    return "early:make"


@pytest.mark.parametrize(("patch", "module"), [("", "socket"), ("gevent", "gevent"), ("eventlet", "eventlet")])
def test_a_child_is_patched_before_anything_is_imported(early: str, patch: str, module: str) -> None:
    if patch:
        assert find_spec(patch), f"install the test extra: {patch} is missing"  # importing it would patch this process
    starter = start_starter([ChildSpec(early, {}, patch=patch)])
    try:
        said, ended = child_of(starter)
    finally:
        starter.close()
    functions, _, number = said.decode().split()
    assert functions.startswith(module)
    assert (number, os.waitstatus_to_exitcode(ended.status)) == ("5", 7)


def test_what_does_not_import_is_told_as_an_end(early: str) -> None:
    starter = start_starter([ChildSpec(early, {"nonsense": 1})])
    try:
        said, ended = child_of(starter)
        assert (said, os.waitstatus_to_exitcode(ended.status)) == (b"", 70)
    finally:
        starter.close()


def test_an_interpreter_that_is_gone_is_a_child_that_could_not_be_had(
    early: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    starter = start_starter([ChildSpec(early, {})])
    try:
        sock, _ = starter.spawn(1, 0)
        sock.close()
        reports: list[object] = []
        until(lambda: reports.extend(starter.reports()) or bool(reports), 10, "a report")  # type: ignore[func-returns-value]
        assert "No such file" in str(reports[0])
    finally:
        starter.close()
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(SettingsError, match=r"does not know its Python"):
        command_of(ChildSpec(early, {}))


HEAVY = """
import asyncio, decimal, email.mime.multipart, http.server, sqlite3, unittest.mock, xml.dom.minidom, concurrent.futures
from fastq import FastQ

app = FastQ("heavy", broker="memory://", backend="memory://")

@app.task(name="nothing")
def nothing(): ...
"""


def test_the_first_child_is_ready_soon_after_its_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heavy.py").write_text(HEAVY)
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    from fastq.running.birth import ChildOptions
    from fastq.worker.options import WorkerOptions
    from fastq.worker.program import FastQProgram

    app = importlib.import_module("heavy").app
    options = WorkerOptions(concurrency=1).resolved(app.conf)
    starter = start_starter([FastQProgram(app).child_spec(options, ChildOptions("w@h"))])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    # Processor time: on a busy machine the clock says more of the others.
    def imported() -> float:
        import_it = "import heavy, time; print(time.process_time())"
        done = subprocess.run(
            [sys.executable, "-c", import_it], env=environment, check=True, capture_output=True, text=True
        )
        return float(done.stdout)

    def ready() -> float:
        sock, reader = starter.spawn(1, 0)
        try:
            sock.settimeout(30)
            assert sock.recv(1)  # the doorbell: it has written that it is ready
            spawned = next(each for each in starter.reports() if isinstance(each, Spawned))
            times = psutil.Process(spawned.pid).cpu_times()
            return times.user + times.system
        finally:
            sock.shutdown(socket.SHUT_RDWR)
            sock.close()
            del reader

    try:
        pairs = [(ready(), imported()) for _ in range(6)][1:]
    finally:
        starter.close()
        sys.modules.pop("heavy", None)
    first, alone = (min(times) for times in zip(*pairs, strict=True))
    print(f"processor time until ready: {first:.3f} s, for the import alone: {alone:.3f} s: {first / alone:.2f}")
    assert first <= 2 * alone  # generous: the machine is shared; 1.5 is what it is to be
