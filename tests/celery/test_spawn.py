"""A Celery application's children from a fresh interpreter: its signals, its settings, its own way of starting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import celery
import pytest
import redis
from celery.exceptions import WorkerLostError

from tests.support.servers import Redis, wait_until
from tests.support.worker_process import ROOT, WorkerProcess

pytestmark = pytest.mark.redis

START = Callable[..., WorkerProcess]
SPAWN = ("--pool-start-method", "spawn")
SOURCE = """
import os, time
import celery
from celery import signals

app = celery.Celery("shop", broker="{url}", backend="{url}")
app.conf.update(broker_connection_retry_on_startup=True, worker_redirect_stdouts=False)
imported_by = os.getpid()
heard = []

def listen(name):
    @getattr(signals, name).connect(weak=False)
    def hear(**_):
        heard.append(name)

for name in ("celeryd_init", "worker_init", "celeryd_after_setup", "worker_before_create_process",
             "import_modules", "after_setup_logger", "after_setup_task_logger", "worker_process_init"):
    if hasattr(signals, name):
        listen(name)

@signals.celeryd_init.connect
def configure(conf, **_):
    conf.result_extended = True
    conf.task_send_sent_event = True

@app.task(name="where")
def where():
    return [os.getpid(), imported_by, heard]

@app.task(name="settings")
def settings():
    is_current = app is celery.current_app._get_current_object()
    return [app.conf.result_extended, app.conf.worker_prefetch_multiplier, app.conf.task_send_sent_event, is_current]

@app.task(name="hold")
def hold(file):
    with open(file, "a") as note:
        note.write(f"{{os.getpid()}}\\n")
    while not os.path.exists(file + ".gate"):
        time.sleep(0.01)
    return "held"

"""


@pytest.fixture
def url(redis_server: Redis) -> str:
    url = redis_server.url(5)
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def client(url: str) -> Iterator[celery.Celery]:
    with celery.Celery("client", broker=url, backend=url, set_as_current=False) as made:
        yield made


def test_a_child_hears_its_own_signals_and_the_main_process_the_others(
    start_worker: START, url: str, client: celery.Celery
) -> None:
    worker = start_worker("-c", "1", *SPAWN, source=SOURCE.format(url=url))
    pid, importer, heard = client.send_task("where").get(timeout=30)
    assert pid == importer
    assert heard == ["import_modules", "after_setup_logger", "after_setup_task_logger", "worker_process_init"]
    assert worker.stop() == 0
    worker.wait_for_no_leftovers()


def test_settings_reach_it_from_receivers_and_from_the_command_line(
    start_worker: START, url: str, client: celery.Celery
) -> None:
    start_worker("-c", "1", *SPAWN, "--", "prefetch_multiplier=7", source=SOURCE.format(url=url))
    assert client.send_task("settings").get(timeout=30) == [True, 7, True, True]


def test_the_setting_has_celery_s_name(start_worker: START, url: str, client: celery.Celery) -> None:
    source = SOURCE.format(url=url) + "app.conf.worker_pool_start_method = 'spawn'\n"
    worker = start_worker("-c", "1", source=source)
    pid, importer, _ = client.send_task("where").get(timeout=30)
    assert pid == importer
    assert "not carried" not in worker.log()


def test_an_application_that_starts_threads_is_spawned_and_its_beat_runs(
    start_worker: START, url: str, client: celery.Celery
) -> None:
    source = SOURCE.format(url=url) + (
        "import threading\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True, name='exporter').start()\n"
        "app.conf.beat_schedule = {'tick': {'task': 'settings', 'schedule': 0.5}}\n"
    )
    worker = start_worker("-c", "1", "-B", source=source)
    pid, importer, _ = client.send_task("where").get(timeout=30)
    assert pid == importer
    worker.wait_for_log(r"WARNING/MainProcess\] children of this application are spawned, .*\('exporter'\)")
    worker.wait_for_log(r"Task settings\[.*succeeded", 30)
    assert worker.stop() == 0
    worker.wait_for_no_leftovers()


def test_celery_s_default_application_is_spawned_too(
    start_worker: START, url: str, client: celery.Celery, tmp_path: Path
) -> None:
    (tmp_path / "tasks_of.py").write_text(
        "import os\nfrom celery import shared_task\n@shared_task(name='where')\ndef where(): return os.getpid()\n"
    )
    (tmp_path / "conf.py").write_text(
        f"broker_url = result_backend = '{url}'\nimports = ['tasks_of']\nbroker_connection_retry_on_startup = True\n"
    )
    command = [sys.executable, "-m", "fastq", "--config", "conf", "worker", "-c1", "-l", "INFO", "--without-mingle"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    with subprocess.Popen([*command, *SPAWN], cwd=tmp_path, env=environment) as worker:
        try:
            assert client.send_task("where").get(timeout=30) != worker.pid
        finally:
            worker.terminate()
    assert worker.returncode == 0


@pytest.mark.parametrize("mode", ["--reliable", "--compat"])
def test_a_call_whose_child_is_killed_runs_again_or_fails_as_with_forks(
    start_worker: START, url: str, client: celery.Celery, tmp_path: Path, mode: str
) -> None:
    worker = start_worker("-c", "1", *SPAWN, mode, source=SOURCE.format(url=url))
    file = tmp_path / "held"
    call = client.send_task("hold", (str(file),))
    wait_until(file.exists, 30, lambda: AssertionError(worker.log()))
    wait_until(lambda: file.read_text().endswith("\n"), 5, lambda: AssertionError(worker.log()))
    os.kill(int(file.read_text()), signal.SIGKILL)
    if mode == "--compat":
        with pytest.raises(WorkerLostError):
            call.get(timeout=30)
    Path(f"{file}.gate").touch()
    if mode == "--reliable":
        assert call.get(timeout=30) == "held"
        assert len(file.read_text().split()) == 2
    assert client.send_task("where").get(timeout=30)[0] not in map(int, file.read_text().split()[:1])
    assert worker.stop() == 0


PROGRAM = """
import celery
import fastq
fastq.patch()

app = celery.Celery("script", broker="{url}", backend="{url}")
app.conf.update(broker_connection_retry_on_startup=True, worker_redirect_stdouts=False)

@app.task
def name():
    return __name__

if __name__ == "__main__":
    app.worker_main(["worker", "-c1", "--without-mingle", "-l", "INFO", "--pool-start-method", "spawn"])
"""


def test_a_program_that_starts_the_worker_is_run_anew_and_its_tasks_keep_their_names(
    url: str, client: celery.Celery, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(PROGRAM.format(url=url))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, env=environment) as worker:
        try:
            assert client.send_task("script.name").get(timeout=30) == "__mp_main__"
        finally:
            worker.terminate()
    assert worker.returncode == 0
