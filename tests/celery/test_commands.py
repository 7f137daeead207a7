"""The commands with a Celery application: what is sent, read and emptied is what Celery's own code would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import celery
import pytest
import redis

from fastq.celery.cli.commands import Multi
from tests.support.forked import run_command
from tests.support.servers import Redis, wait_until
from tests.support.worker_process import ROOT, Program, WorkerProcess

pytestmark = pytest.mark.redis

SOURCE = """
import os, sys
from celery import Celery
from kombu import Queue

app = Celery("tasks", broker="{url}", backend="{url}")
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_queues=[Queue("celery"), Queue("mail", routing_key="post")],
    task_routes={{"post": {{"queue": "mail"}}}},
    task_serializer="yaml", accept_content=["yaml", "json"],
    result_serializer="yaml", result_backend_transport_options={{"global_keyprefix": "mine_"}},
)

@app.task(name="post")
def post(x):
    return x

imported_by = sys.argv[0]

@app.task(name="programs")
def programs():
    return [os.path.basename(imported_by), os.path.basename(sys.argv[0])]

@app.task(name="fail")
def fail():
    raise KeyError("no such thing")
"""

ODD = """
import pathlib
from celery import Celery

app = Celery("tasks", broker="amqp://127.0.0.1:1//")
app.conf.update({changes})
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def url(redis_server: Redis) -> str:
    """An empty database."""
    url = redis_server.url(4)
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def run(url: str, tmp_path: Path) -> Run:
    """A function that runs a command line with the application and returns what came of it."""
    (tmp_path / "tasks.py").write_text(SOURCE.format(url=url), encoding="utf-8")

    def run(*arguments: str, program: Program = "fastq") -> subprocess.CompletedProcess[str]:
        return run_command(program, arguments, tmp_path, {**os.environ, "PYTHONPATH": str(ROOT)})

    return run


def test_a_call_is_routed_and_written_as_the_application_would(run: Run, url: str) -> None:
    done = run("-A", "tasks", "call", "post", "-a", "[1]", "-k", '{"y": 2}', "--countdown", "60")
    assert done.returncode == 0, done.stderr
    with redis.Redis.from_url(url) as client:
        (message,) = client.lrange("mail", 0, -1)
    found = json.loads(message)
    assert found["headers"]["id"] == done.stdout.strip()
    assert found["content-type"] == "application/x-yaml"
    assert found["headers"]["eta"]
    assert run("-A", "tasks", "purge", "-f", "-Q", "mail").stdout == "Purged 1 message from 1 known task queue.\n"


def test_results_are_read_as_the_application_reads_them(
    run: Run, url: str, start_worker: Callable[..., WorkerProcess]
) -> None:
    start_worker("-c1", "-Q", "celery,mail", source=SOURCE.format(url=url))
    done = run("-A", "tasks", "call", "post", "-a", '["word"]', "--wait", "20")
    assert (done.returncode, done.stdout.split()[1:]) == (0, ["word"]), done.stderr
    task_id = done.stdout.split()[0]
    for program in ("celery", "fastq"):
        assert run("-A", "tasks", "result", task_id, program=program).stdout == "word\n"
    assert run("-A", "tasks", "result", task_id, "-t", "post").stdout == "word\n"
    # Projects decide by the program's name whether a worker imports them.
    done = run("-A", "tasks", "call", "programs", "--wait", "20")
    assert done.stdout.split("\n", 1)[1].split() == ["['celery',", "'celery']"], done.stderr
    failed = run("-A", "tasks", "call", "fail", "--wait", "20")
    assert failed.returncode == 1
    assert "ended as FAILURE: KeyError('no such thing')" in failed.stderr
    shown = run("-A", "tasks", "result", failed.stdout.strip(), "--traceback")
    assert shown.stdout.rstrip().endswith("KeyError: 'no such thing'")
    status = run("-A", "tasks", "status")
    assert re.fullmatch(r"->  celery@\S+: OK\n\n1 node online\.\n", status.stdout)


def test_a_result_that_is_not_there_is_not_waited_for(run: Run) -> None:
    done = run("-A", "tasks", "result", str(uuid.uuid4()))
    assert (done.returncode, "is not ready (PENDING)" in done.stderr) == (75, True)
    done = run("-A", "tasks", "result", "x", "-t", "unknown")
    assert (done.returncode, "task 'unknown' is not registered" in done.stderr) == (78, True)


def test_purge_empties_all_queues_of_the_application(run: Run) -> None:
    run("-A", "tasks", "call", "post", "-a", "[1]")
    run("-A", "tasks", "call", "fail")
    assert run("-A", "tasks", "purge", "-f").stdout == "Purged 2 messages from 2 known task queues.\n"


def test_a_broker_that_is_away_is_a_temporary_failure_in_one_line(run: Run) -> None:
    for command in (["call", "post"], ["purge", "-f"]):
        done = run("-A", "tasks", "-b", "redis://:secret@127.0.0.1:1/0", *command)
        assert (done.returncode, done.stderr.count("\n")) == (75, 1), done.stderr
        assert "redis://:**@127.0.0.1:1/0" in done.stderr


@pytest.mark.parametrize(
    "words",
    [["list", "bindings"], ["graph", "bootsteps"], ["beat", "--help"], ["logtool", "stats", "no-such-file"],
     ["multi", "names", "2"], ["multi", "bogus"], ["shell", "--bogus"], ["upgrade", "settings"], ["flower", "--help"]],
    ids=" ".join,
)  # fmt: skip
def test_celery_s_own_commands_run_with_their_output_and_exit_code(run: Run, words: list[str]) -> None:
    theirs, ours = (run("-A", "tasks", *words, program=program) for program in ("celery", "fastq"))
    assert lines(ours) == lines(theirs)
    # Celery says that all was well even when `multi` did not understand.
    assert ours.returncode == (1 if words == ["multi", "bogus"] else theirs.returncode), ours.stderr


def test_the_report_is_celery_s_with_our_versions_in_it(run: Run) -> None:
    theirs, ours = (lines(run("-A", "tasks", "report", program=program)) for program in ("celery", "fastq"))
    [version] = set(ours) - set(theirs)
    assert version.startswith("            fastq:")
    assert [line for line in ours if line != version] == theirs


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what was printed, without addresses and the program's name; sets come in any order."""
    return sorted(re.sub(r"0x[0-9a-f]+|Usage: .*?(?=beat|flower)", "*", done.stdout).splitlines())


def test_a_fault_of_the_project_in_one_of_those_is_not_called_ours(run: Run) -> None:
    done = run("-A", "tasks", "beat", "--scheduler", "tasks:too_old", "--pidfile=", "-s", "unused")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert re.search(r"^Error: Celery's command 'beat' failed: AttributeError: .*too_old", done.stderr, re.M)
    assert "internal error" not in done.stderr


@pytest.mark.versions
def test_without_an_application_a_configuration_makes_celery_s_default_one(run: Run, tmp_path: Path, url: str) -> None:
    (tmp_path / "conf.py").write_text(f"broker_url = {url!r}\nimports = ['own']\n", encoding="utf-8")
    (tmp_path / "own.py").write_text(
        "from celery import shared_task\n@shared_task(name='mine')\ndef mine(): pass\n", encoding="utf-8"
    )
    done = run("--config", "conf", "check")
    assert (done.returncode, "fast        mine" in done.stdout, url in done.stdout) == (0, True, True), done.stderr
    away = run("-b", "redis://127.0.0.1:1/0", "worker", "--", "broker_connection_retry_on_startup=0")
    assert (away.returncode, "celery@" in away.stdout) == (75, True), away.stderr
    (tmp_path / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    for name, error in (("broken", "ZeroDivisionError"), ("nowhere", "ModuleNotFoundError")):
        done = run("--config", name, "worker")
        assert (done.returncode, error in done.stderr, "Traceback" in done.stderr) == (1, True, False), done.stderr


def test_a_name_that_nobody_knows_is_a_usage_error(run: Run) -> None:
    done = run("-A", "tasks", "nonsense")
    assert (done.returncode, "No such command 'nonsense'" in done.stderr) == (2, True)


@pytest.mark.versions
def test_nodes_of_multi_are_workers_of_fastq(run: Run, tmp_path: Path, url: str) -> None:
    files = (f"--pidfile={tmp_path}/%n.pid", f"--logfile={tmp_path}/%n%I.log")
    done = run("-A", "tasks", "multi", "start", "w1", "-l", "INFO", "-c", "1", *files)
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        log = tmp_path / "w1.log"
        wait_until(lambda: "ready." in log.read_text(), 20, lambda: AssertionError(log.read_text()))
        with celery.Celery("client", broker=url, set_as_current=False) as client:
            client.conf.accept_content = ["json", "yaml"]
            names = [name for reply in client.control.ping(timeout=5, limit=1) for name in reply]
        assert [name.partition("@")[0] for name in names] == ["w1"]
        assert "-m fastq -A tasks worker" in run("-A", "tasks", "multi", "show", "w1", *files).stdout
    finally:
        stopped = run("multi", "stopwait", "w1", *files)
    assert stopped.returncode == 0, stopped.stdout
    assert not (tmp_path / "w1.pid").exists()


@pytest.mark.versions
def test_options_before_multi_are_those_of_its_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    tool = Multi(quiet=False, no_color=True)
    assert tool.execute_from_commandline(["multi", "show", "w1", "-c", "3", "--pidfile=", "--logfile=", "-A", "x"]) == 0
    assert "-m fastq -A x worker --detach -c 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "command", "code", "text"),
    [
        *(
            (f"{name}={value}", command, 78, f"setting '{name}' cannot be used")
            for name, command in (
                ("result_backend", ("result", "x")),
                ("result_backend", ("call", "x")),
                ("broker_url", ("call", "x")),
            )
            for value in ("5", "[5]", "b'redis://localhost'", "pathlib.Path('/tmp')")
        ),
        ("result_backend=5", ("worker",), 78, "setting 'result_backend' cannot be used"),
        ("worker_log_format=5", ("worker",), 78, "setting 'worker_log_format' cannot be used"),
        ("worker_task_log_format='nothing'", ("worker",), 78, "worker_task_log_format"),
        ("", ("result", "x"), 1, "stores no results"),
    ],
)
def test_a_setting_of_a_wrong_kind_is_named(
    run: Run, tmp_path: Path, changes: str, command: tuple[str, ...], code: int, text: str
) -> None:
    (tmp_path / "odd.py").write_text(ODD.format(changes=changes), encoding="utf-8")
    done = run("-A", "odd", *command)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
