"""The worker's options with a Celery application: each means what it means to stock Celery, or is refused in a line."""

from __future__ import annotations

import os
import pwd
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import celery
import click
import psutil
import pytest
import redis
from celery.bin.worker import worker as celery_worker

from fastq.celery.conf.options import celery_options
from fastq.cli import _read_variables
from fastq.cli.worker import command as fastq_worker
from fastq.worker.options import WorkerOptions
from tests.celery.conftest import OpenStage
from tests.celery.test_children import APPS, ask
from tests.support.forked import run_command
from tests.support.servers import Redis, wait_until
from tests.support.worker_process import ROOT, Program, WorkerProcess

pytestmark = pytest.mark.redis

DATABASE = 6
ALONE = ("--without-gossip", "--without-mingle")
START = Callable[..., WorkerProcess]

SOURCE = """
import logging, os, sys, time
from celery import Celery, signals
from celery.utils.log import get_task_logger
from click import Option

app = Celery("tasks", broker="{url}", backend="{url}")
app.conf.broker_connection_retry_on_startup = True
app.user_options["worker"].add(Option(["--magic"], default="none"))
app.user_options["worker"].add(Option(["--shiny"], is_flag=True))
app.user_options["preload"].add(Option(["-Z", "--template"], default="plain"))
logger = get_task_logger("shop")

@signals.user_preload_options.connect
def preloaded(options, **_):
    print("preload", options)

@signals.celeryd_init.connect
def begun(sender, instance, conf, options, **_):
    names = ("magic", "shiny", "template", "loglevel", "queues", "concurrency", "optimization", "time_limit")
    print("init", sender, [options.get(name) for name in names])
    conf.worker_prefetch_multiplier = 2 if options["magic"] == "two" else conf.worker_prefetch_multiplier

@signals.celeryd_after_setup.connect
def set_up(sender, instance, conf, **_):
    print("conf", conf.worker_prefetch_multiplier, conf.broker_heartbeat, conf.task_default_queue)
    if instance.options.get("shiny"):
        instance.app.amqp.queues.select_add("chosen")

@app.task(name="said")
def said(word):
    logging.getLogger("shop").warning("plain %s", word)
    logger.warning("task %s", word)
    print(f"printed {{word}}")

@app.task(name="hold")
def hold(gate):
    print("holding")
    while not os.path.exists(gate):
        time.sleep(0.02)
"""


@pytest.fixture
def url(redis_server: Redis) -> str:
    """An empty database."""
    url = redis_server.url(DATABASE)
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture(params=["celery", "fastq"], ids=["under_celery", "under_fastq"])
def program(request: pytest.FixtureRequest) -> Program:
    """The program whose worker is started."""
    chosen: Program = request.param
    return chosen


@pytest.fixture
def run(url: str, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs a command line with the application and returns what came of it."""
    (tmp_path / "tasks.py").write_text(SOURCE.format(url=url), encoding="utf-8")

    def run(*arguments: str, program: Program = "fastq", **environ: str) -> subprocess.CompletedProcess[str]:
        return run_command(program, arguments, tmp_path, {**os.environ, "PYTHONPATH": str(ROOT), **environ})

    return run


def facts(worker: WorkerProcess) -> list[str]:
    """Return what both programs say of themselves at start: node name, banner, queues, tasks, what signals saw."""
    log = worker.log().replace("//:**@", "//")  # Celery hides a password that nobody has given
    (node,) = re.findall(r"^ -+ (\S+@\S+) v", log, re.M)
    banner = re.findall(r"\.> (?:concurrency|task events|transport|results): .*|\.> \S+ +exchange=.*", log)
    tasks = re.findall(r"^  \. \S+$", log, re.M)
    return [node, *banner, *tasks, *re.findall(r"^(?:preload|init|conf) .*", log, re.M)]


@pytest.mark.since("5.7", "a worker whose name has %% in it does not start")
def test_the_start_of_a_worker_is_celery_s(url: str, start_worker: START) -> None:
    lines = [
        [],
        ["-n", "w%%1@%h", "-Q", "b,a", "-X", "b", "--autoscale=3,1", "-E", "--pidfile=", "-O", "fair"],
        ["-n", "other", "--magic=two", "--shiny", "-Z", "gold", "--time-limit=7", "-ldebug", "-c1"],
        ["-c", "0", "--prefetch-multiplier", "0", "--", ".prefetch_multiplier=1", "broker.heartbeat=30"],
        ["-c2", "--prefetch-multiplier=3", "worker.prefetch_multiplier=9", "task_default_queue=other"],
    ]
    for line in lines:
        seen = [
            facts(start_worker(*ALONE, *line, source=SOURCE.format(url=url), program=program))
            for program in ("celery", "fastq")
        ]
        assert seen[1] == seen[0], line


def celery_reads(words: list[str]) -> dict[str, Any]:
    app = celery.Celery("x", set_as_current=False)
    with celery_worker.make_context("worker", list(words), obj=SimpleNamespace(app=app)) as ctx:
        return dict(ctx.params)


def fastq_reads(words: list[str]) -> dict[str, Any]:
    with fastq_worker.make_context("worker", list(words), obj=None) as ctx:
        names = {field for field in WorkerOptions.__dataclass_fields__ if field in ctx.params}
        given = {name: ctx.params[name] for name in names}
        return {**ctx.params, **celery_options(WorkerOptions(**given))}


@pytest.mark.parametrize(
    "line",
    [
        "-c2", "-c 2", "--concurrency=2", "--concurrency 2",
        "-linfo", "-l INFO", "--loglevel=Debug", "-l fatal", "--loglevel CRITICAL",
        "-Qa,b", "-Q a,b", "--queues=a", "-X c", "--exclude-queues c,d", "-I m,n", "--include=m",
        "-S state", "--statedb=state", "-Ofair", "-O fair", "-E", "--task-events", "--events",
        "--time-limit=1.5", "--soft-time-limit 3", "--max-tasks-per-child=4", "--max-memory-per-child 5000",
        "--autoscale=10,3", "--autoscale 3,10", "--autoscale=7", "--purge", "--discard",
        "--without-gossip", "--without-mingle --without-heartbeat", "--heartbeat-interval=5",
        "--prefetch-multiplier=2", "-f log", "--logfile=log", "--pidfile pid", "--pidfile=",
        "--uid 5", "--gid=6", "--umask 022", "-D", "--detach", "-c2 -E -Qa --purge -l info",
        "-P prefork", "--pool=processes",
        pytest.param("--disable-prefetch", marks=pytest.mark.since("5.6", "there is no such option")),
        pytest.param("--pool-start-method=fork", marks=pytest.mark.since("5.7", "there is no such option")),
        pytest.param("--pool-start-method spawn", marks=pytest.mark.since("5.7", "there is no such option")),
    ],
)  # fmt: skip
def test_an_option_is_read_in_each_of_its_forms(line: str) -> None:
    words = line.split()
    theirs, ours = celery_reads(words), fastq_reads(words)
    changed = {name for name, value in theirs.items() if value != celery_reads([])[name]} - {"pool"}
    for name in changed:
        assert ours[name] == theirs[name] or str(ours[name]) == str(theirs[name]), name
    if "pool" not in line and "-P" not in line and line != "--pidfile=" and not line.endswith("--loglevel=WARNING"):
        assert changed, "the line says nothing"


def test_every_option_of_celery_s_worker_is_known() -> None:
    known = {name for option in fastq_worker.params for name in (*option.opts, *option.secondary_opts)}
    theirs = {name for option in celery_worker.params if isinstance(option, click.Option) for name in option.opts}
    assert theirs - known == set()


def test_options_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    _read_variables(fastq_worker, "worker_")
    for name in ("FASTQ_WORKER_CONCURRENCY", "CELERY_WORKER_TIME_LIMIT", "CELERY_WORKER_LOGLEVEL"):
        monkeypatch.setenv(name, "INFO" if name.endswith("LEVEL") else "3")
    read = fastq_reads([])
    assert (read["concurrency"], read["time_limit"], read["loglevel"]) == (3, 3.0, 20)
    monkeypatch.setenv("CELERY_WORKER_CONCURRENCY", "4")
    assert fastq_reads([])["concurrency"] == 3


def test_celery_s_variables_name_application_broker_and_colour(url: str, start_worker: START, program: Program) -> None:
    other = url.replace(f"/{DATABASE}", "/7")
    environment = {
        "CELERY_BROKER_URL": other,
        "CELERY_WORKER_CONCURRENCY": "3",
        "CELERY_NO_COLOR": "1",
        "CELERY_SKIP_CHECKS": "1",
    }
    source = SOURCE.format(url=url)
    worker = start_worker(*ALONE, source=source, program=program, env=environment)
    assert f".> transport:   {other}" in facts(worker)
    assert ".> concurrency: 3 (prefork)" in facts(worker)


def test_a_setting_after_the_options_is_the_worker_s_unless_it_says_otherwise(url: str, start_worker: START) -> None:
    words = ("--", "prefetch_multiplier=1", "broker.heartbeat=30", "task_default_queue=own")
    worker = start_worker(*ALONE, "-c1", *words, source=SOURCE.format(url=url))
    assert "conf 1 30 own" in worker.log()
    assert re.search(r"\.> own +exchange=own\(direct\) key=own", worker.log())


def test_a_setting_after_the_options_that_cannot_be_read_is_refused(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run("-A", "tasks", "worker", "--", "nonsense.setting=1")
    assert done.returncode == 78
    assert done.stderr.count("\n") == 1


def test_files_and_mask_that_the_settings_name_count_where_no_option_does(
    url: str, start_worker: START, program: Program, tmp_path: Path
) -> None:
    conf = (
        f"app.conf.update(worker_pidfile='{tmp_path}/%n.pid', worker_logfile='{tmp_path}/%n.log', worker_umask='027')"
    )
    worker = start_worker(*ALONE, "-c1", source=SOURCE.format(url=url) + conf, program=program, await_ready=False)
    log = tmp_path / "celery.log"
    wait_until(lambda: log.exists() and "ready." in log.read_text(), 20, lambda: AssertionError(worker.log()))
    assert int((tmp_path / "celery.pid").read_text()) == worker.pid
    if program == "fastq":  # Celery itself minds the mask only when it is detached
        assert log.stat().st_mode & 0o777 == 0o640
    assert worker.stop() == 0
    assert not (tmp_path / "celery.pid").exists()


# Python's own modules may lie where only root may look; a folder that is open stays open.
HOLD_OPEN = """
held = {{path: f"/proc/self/fd/{{os.open(path, os.O_RDONLY)}}" for path in sys.path if os.path.isdir(path)}}
packages = [each.__path__ for each in [*sys.modules.values()] if isinstance(getattr(each, "__path__", None), list)]
for paths in [sys.path, *packages]:
    for start in sorted(held, key=len, reverse=True):
        paths[:] = [held[start] + path[len(start) :] if path.startswith(start) else path for path in paths]
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_user_and_group_that_the_settings_name_are_those_of_every_process(url: str, start_worker: START) -> None:
    conf = "app.conf.update(worker_uid='nobody', worker_gid=12345)"
    worker = start_worker(*ALONE, "-c1", source=(SOURCE + HOLD_OPEN).format(url=url) + conf)
    send(url, "said", "x")
    worker.wait_for_log("printed x", 20)
    nobody = pwd.getpwnam("nobody").pw_uid
    who = {(tuple(each.uids()), tuple(each.gids())) for each in map(psutil.Process, worker.tree())}
    assert who == {((nobody,) * 3, (12345,) * 3)}


def test_a_cold_stop_lets_tasks_end_for_the_time_of_a_soft_shutdown(
    url: str, start_worker: START, tmp_path: Path
) -> None:
    def holding(soft_s: str) -> WorkerProcess:
        source = SOURCE.format(url=url) + f"app.conf.worker_soft_shutdown_timeout = {soft_s}\n"
        worker = start_worker(*ALONE, "-c1", source=source, program="fastq")
        with celery.Celery("client", broker=url, set_as_current=False) as client:
            client.send_task("hold", [str(tmp_path / soft_s)])
        worker.wait_for_log("holding")
        worker.signal(signal.SIGQUIT)
        worker.wait_for_log(f"Initiating Soft Shutdown, terminating in {soft_s} seconds")
        return worker

    patient = holding("60.0")
    (tmp_path / "60.0").touch()
    assert patient.wait(10) == 1
    assert "Task hold" in patient.wait_for_log(r"Task hold\[\S+\] succeeded")[0]
    late = holding("0.5")
    assert late.wait(10) == 1
    assert "running tasks did not end within 0.5 s; they are given back: hold[" in late.log()
    asked_twice = holding("90.0")
    asked_twice.signal(signal.SIGQUIT)
    assert asked_twice.wait(10) == 1
    assert "the worker stops at once; they are given back: hold[" in asked_twice.log()
    asked_twice.wait_for_no_leftovers()


@pytest.mark.since("5.5", "there is no soft shutdown")
def test_an_idle_worker_has_a_soft_shutdown_where_the_settings_ask_for_it(
    url: str, start_worker: START, program: Program
) -> None:
    conf = "app.conf.update(worker_soft_shutdown_timeout=1.5, worker_enable_soft_shutdown_on_idle=True)"
    worker = start_worker(*ALONE, "-c1", source=SOURCE.format(url=url) + conf, program=program)
    with celery.Celery("client", broker=url, set_as_current=False) as client:
        client.send_task("said", ["x"], countdown=3600)
    worker.wait_for_log(r"Task said\[\S+\] received")
    asked_at = time.monotonic()
    worker.signal(signal.SIGQUIT)
    worker.wait_for_log("Initiating Soft Shutdown, terminating in 1.5 seconds")
    worker.wait(10)
    assert time.monotonic() - asked_at >= 1.5
    with redis.Redis.from_url(url) as broker:
        assert broker.llen("celery") == 1
        assert broker.hlen("unacked") == 0


def test_an_unknown_option_is_a_usage_error(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    for program in ("celery", "fastq"):
        done = run("-A", "tasks", "worker", "--magic", "x", "--bogus", program=program)
        assert done.returncode == 2
        assert "No such option" in done.stderr
        assert "--bogus" in done.stderr


# --- logs


def without_times(text: str) -> list[str]:
    """Return the log lines of task code and prints, without what differs from run to run."""
    lines = [line for line in text.splitlines() if re.search(r"plain x|task x|printed", line)]
    return sorted(re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+|[0-9a-f-]{36}", "*", line) for line in lines)


@pytest.mark.parametrize(
    "settings",
    ["", "worker_redirect_stdouts_level=ERROR", "worker_redirect_stdouts=false",
     "worker_log_format=custom:%(levelname)s:%(name)s:%(processName)s:%(message)s "
     "worker_task_log_format=custom_task:%(task_name)s:%(name)s:%(message)s"],
    ids=["default", "level", "no redirection", "formats"],
)  # fmt: skip
def test_what_a_task_logs_and_prints_looks_the_same(url: str, start_worker: START, settings: str) -> None:
    seen: list[list[str]] = []
    for program in ("celery", "fastq"):
        worker = start_worker(*ALONE, "-c1", *settings.split(), source=SOURCE.format(url=url), program=program)
        send(url, "said", "x")
        worker.wait_for_log(r"Task said\[\S+ succeeded|printed x", 20)
        assert worker.stop() == 0
        seen.append(without_times(worker.log()))
    assert seen[1] == seen[0]
    assert len(seen[0]) == 3


def test_each_child_has_its_own_log_file(url: str, start_worker: START) -> None:
    seen: list[dict[str, list[str]]] = []
    for program in ("celery", "fastq"):
        options = ("-c1", "-n", "w1@here", "-f", "%n%I-%i.log")
        worker = start_worker(*ALONE, *options, source=SOURCE.format(url=url), program=program, await_ready=False)
        file = worker.folder / "w1-1-1.log"
        send(url, "said", "x")
        wait_until(
            lambda file=file: file.exists() and "printed x" in file.read_text(),
            20,
            lambda worker=worker: AssertionError(f"{os.listdir(worker.folder)}\n{worker.log()}"),
        )
        assert worker.stop() == 0
        seen.append({each.name: without_times(each.read_text()) for each in worker.folder.glob("w1*.log")})
    assert seen[1] == seen[0]
    assert sorted(seen[0]) == ["w1-0.log", "w1-1-1.log"]


def test_a_log_file_is_followed_when_it_is_rotated(url: str, start_worker: START, program: Program) -> None:
    worker = start_worker(
        *ALONE, "-c1", "-f", "w.log", source=SOURCE.format(url=url), program=program, await_ready=False
    )
    file = worker.folder / "w.log"
    failed = lambda: AssertionError(worker.log())  # noqa: E731
    wait_until(lambda: file.exists() and "ready." in file.read_text(), 20, failed)
    file.rename(worker.folder / "w.log.1")
    send(url, "said", "x")
    wait_until(lambda: file.exists() and "task x" in file.read_text(), 20, failed)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is warned")
@pytest.mark.parametrize("application", APPS)
@pytest.mark.parametrize("options", [(), ("-f", "w.log")], ids=["stderr", "file"])
def test_root_is_warned_once(open_stage: OpenStage, application: str, options: tuple[str, ...]) -> None:
    stage = open_stage("fastq", "redis", "redis")
    worker = stage.start_worker("-c", "1", *options, app=APPS[application], await_ready=False)
    file = worker.folder / "w.log" if options else worker.log_file
    wait_until(lambda: file.exists() and " ready." in file.read_text(), 30, lambda: AssertionError(worker.log()))
    assert ask(stage, "identity")["index"] == 0
    assert worker.stop() == 0
    both = worker.log() + (file.read_text() if options else "")
    assert both.count("superuser privileges") == 1
    assert both.count(f"uid={os.getuid()} euid={os.geteuid()}") == 1


# --- prefetch


def send(url: str, name: str, *args: Any) -> None:
    with celery.Celery("client", broker=url, set_as_current=False) as client:
        client.send_task(name, args, ignore_result=True)


def test_without_prefetch_a_message_stays_in_redis_until_a_child_is_free(
    url: str, start_worker: START, program: Program, tmp_path: Path
) -> None:
    worker = start_worker(*ALONE, "-c1", "--disable-prefetch", source=SOURCE.format(url=url), program=program)
    gates = [str(tmp_path / f"gate{number}") for number in range(3)]
    with redis.Redis.from_url(url) as client:
        for number, gate in enumerate(gates):
            send(url, "hold", gate)
            if number == 0:
                worker.wait_for_log("holding", 20)
        for number, gate in enumerate(gates):
            worker.wait_for_log("holding", 20, count=number + 1)
            # The worker has had every chance to take more: it answers a ping in between.
            send(url, "said", "x")
            assert client.llen("celery") == 2 - number + number + 1
            Path(gate).touch()
    worker.wait_for_log("printed x", 20, count=3)


@pytest.mark.rabbitmq
def test_other_brokers_do_not_know_how_to_do_without_prefetch(
    amqp_url: str, start_worker: START, program: Program
) -> None:
    source = SOURCE.format(url=amqp_url).replace(f'backend="{amqp_url}"', 'backend="rpc://"')
    worker = start_worker(*ALONE, "-c1", "--disable-prefetch", source=source, program=program)
    worker.wait_for_log(
        "worker_disable_prefetch is only supported for Redis brokers. Current broker transport: amqp", 10
    )


# --- finding the application

SPECS = ["pack", "pack.celery", "pack.celery:app", "pack:celery_app", "pack.celery_app", "plain", "plain.other",
         "odd"]  # fmt: skip

STRAY = "from celery import Celery\nstray = Celery('stray')\n"

FINDER = """
import sys
from celery.app.utils import find_app
from fastq.cli.loader import find_any_app
for spec in sys.argv[1:]:
    print(spec, find_app(spec) is find_any_app(spec), find_any_app(spec).main)
"""


def test_an_application_is_found_where_celery_finds_it(tmp_path: Path) -> None:
    app = "from celery import Celery\napp = Celery('{name}')\n"
    for name, text in {
        "pack/__init__.py": f"{STRAY}from .celery import app as celery_app\n",
        "pack/celery.py": app.format(name="pack"),
        "plain.py": "from celery import Celery\nother = Celery('other')\ncelery = other\n",
        "odd.py": app.format(name="odd").replace("app =", "strange ="),
        "finder.py": FINDER,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "finder.py", *SPECS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [[spec, "True"] for spec in SPECS]


@pytest.mark.parametrize(
    "program", [pytest.param("celery", marks=pytest.mark.since("5.7", "the report is not by that loader")), "fastq"]
)
def test_loader_configuration_module_and_working_directory_are_celery_s(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, program: Program
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "bare.py").write_text("from celery import Celery\napp = Celery('bare')\n", encoding="utf-8")
    (inner / "config.py").write_text("task_default_queue = 'from_config'\n", encoding="utf-8")
    (inner / "loading.py").write_text(
        "from celery.loaders.app import AppLoader\nclass Loader(AppLoader):\n    pass\n", encoding="utf-8"
    )
    options = ("--workdir", "inner", "--config=config", "--loader", "loading.Loader", "-A", "bare")
    done = run(*options, "report", program=program)
    assert done.returncode == 0, done.stderr
    assert "task_default_queue: 'from_config'" in done.stdout
    assert "loader   -> loading.Loader" in done.stdout
