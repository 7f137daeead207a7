"""The benchmark's own arithmetic and its view of the kernel: a wrong yardstick would pass unnoticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import __main__ as program
from bench import measure, report
from bench.metrics import METRICS, UNITS
from bench.peers.counter import Counter
from bench.report import Sample
from bench.systems import System
from tests import ROOT
from tests.support.servers import wait_until

BURN = "import time\nend = time.process_time() + {0}\nwhile time.process_time() < end: pass\n"


def test_the_cpu_of_another_process_is_known_to_the_millisecond() -> None:
    program = BURN.format(0.2) + "print(time.process_time(), flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        own = float(process.stdout.readline())
        seen = measure.own_cpu_s(process.pid)
        process.communicate("\n")
    assert seen == pytest.approx(own, abs=0.02)
    assert measure.own_cpu_s(process.pid) == 0.0


def test_children_that_have_ended_still_count() -> None:
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN.format(0.3)!r}])\n"
    program = child + "print('done', flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        cpu = measure.cpu_of(measure.tree_of(process.pid))
        process.communicate("\n")
    assert cpu.seconds >= 0.3


def test_a_frozen_tree_does_nothing_until_it_is_let_go() -> None:
    program = "import time\nwhile True: print('x', flush=True); time.sleep(0.005)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with measure.frozen(process.pid) as pids:
            assert pids == [process.pid]
            wait_until(lambda: measure.stat_fields(process.pid)[0] == "T", 5, lambda: TimeoutError("not stopped"))
            before = measure.own_cpu_s(process.pid)
            time.sleep(0.05)
            assert measure.own_cpu_s(process.pid) == before
        wait_until(lambda: measure.stat_fields(process.pid)[0] != "T", 5, lambda: TimeoutError("still stopped"))
        process.kill()


def test_completions_of_several_processes_are_summed(tmp_path: Path) -> None:
    counter = Counter(tmp_path / "counter")
    program = (
        "import sys; from bench.peers.counter import Counter\n"
        "counter = Counter(sys.argv[1])\nfor _ in range(1000): counter.add()"
    )
    workers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "counter")], cwd=ROOT) for _ in range(3)]
    assert [worker.wait(30) for worker in workers] == [0, 0, 0]
    assert counter.total() == 3000


def test_threads_of_one_process_lose_no_completion(tmp_path: Path) -> None:
    counter = Counter(tmp_path / "counter")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: [counter.add() for _ in range(20_000)], range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert counter.total() == 160_000


def test_the_summary_of_strace_is_read_with_and_without_an_errors_column() -> None:
    text = (
        "% time     seconds  usecs/call     calls    errors syscall\n"
        "------ ----------- ----------- --------- --------- ----------------\n"
        " 60.00    0.000120           4        30         3 recvfrom\n"
        " 40.00    0.000080           8        10           epoll_wait\n"
        "------ ----------- ----------- --------- --------- ----------------\n"
        "100.00    0.000200           5        40         3 total\n"
    )
    assert measure.parse_summary(text) == {"recvfrom": 30, "epoll_wait": 10}


def samples(*rows: tuple[int, str, float]) -> list[Sample]:
    return [Sample("drain", entrant, round_number, {"worker_us": value}) for round_number, entrant, value in rows]


def test_a_ratio_is_taken_within_a_round_before_the_median() -> None:
    # The second round ran on a machine twice as slow: the ratio stays.
    rows = samples((1, "fastq", 10), (1, "celery", 800), (2, "fastq", 20), (2, "celery", 1600), (3, "celery", 900))
    assert report.ratio(rows, "drain", "fastq", "celery", "worker_us") == 80
    assert report.ratio(rows, "drain", "fastq", "huey", "worker_us") is None


def test_a_rate_is_better_when_it_is_higher() -> None:
    rows = [Sample("drain", "fastq", 1, {"tasks_s": 9000.0}), Sample("drain", "floor", 1, {"tasks_s": 10000.0})]
    assert report.ratio(rows, "drain", "fastq", "floor", "tasks_s") == pytest.approx(0.9)


def test_the_table_shows_the_median_and_the_spread() -> None:
    rows = samples((1, "fastq", 9), (2, "fastq", 12), (3, "fastq", 10), (1, "celery", 900))
    text = report.table(METRICS[0], rows)
    assert "| fastq | 10.0 (9.00..12.0) | 90.0" not in text  # the ratio of medians
    assert "| fastq | 10.0 (9.00..12.0) | 100 × |" in text  # the one round that has both


def test_what_is_written_as_json_is_read_back(tmp_path: Path) -> None:
    described = {"date": "2026-01-01", "load_after": [1.0]}
    rows = samples((1, "fastq", 9.5))
    report.write_json(tmp_path / "bench.json", described, "python -m bench", rows)  # type: ignore[arg-type]
    assert report.read_json(tmp_path / "bench.json") == (described, "python -m bench", rows)


def test_every_metric_is_listed_and_its_baselines_take_part() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == [metric.name for metric in METRICS]
    for metric in METRICS:
        names = {entrant.name for entrant in metric.entrants}
        assert {entrant for entrant, _ in metric.baselines} <= names
        assert {figure for _, figure in metric.baselines} <= UNITS.keys()
    assert {name for name, _ in report.PICTURE} <= {metric.name for metric in METRICS}
    assert {figure for _, figure in report.PICTURE} <= UNITS.keys()


def test_a_family_of_metrics_is_chosen_by_its_name() -> None:
    names = {metric.name for metric in program.chosen(program.arguments(["--only", "io,drain"]))}
    assert names == {"drain"} | {metric.name for metric in METRICS if metric.name.startswith("io-")}
    with pytest.raises(SystemExit, match="unknown metric 'oi'"):
        program.chosen(program.arguments(["--only", "oi"]))


URLS = {"amqp": "amqp://guest:guest@127.0.0.1:1/v", "redis": "redis://127.0.0.1:1/1", "sqlite": "sqlite:///queue.db"}
SYSTEMS = [
    (metric.broker, entrant.system) for metric in METRICS for entrant in metric.entrants if entrant.system is not None
]
APPLICATIONS = {(broker, system.module): system for broker, system in SYSTEMS}
#: Read a command line as its program would, without doing what it says, and return what the program does not know.
CLICK = """
import click
def read(words):
    context = click.Context(group)
    _, words, _ = group.make_parser(context).parse_args(words)
    command = group.get_command(context, words[0])
    return command.make_parser(click.Context(command)).parse_args(words[1:])[1]
"""
READERS = {
    "fastq": f"from fastq.cli import group\n{CLICK}",
    "celery": f"from celery.bin.celery import celery as group\n{CLICK}",
    "taskiq": "from taskiq.cli.worker.args import WorkerArgs\ndef read(words): WorkerArgs.from_cli(words[1:])",
    "dramatiq": "from dramatiq.cli import make_argument_parser as make\ndef read(words): make().parse_args(words)",
    "huey.bin.huey_consumer": (
        "from huey.consumer_options import OptionParserHandler as Handler\n"
        "def read(words): return Handler().get_option_parser().parse_args(words)[1][1:]"
    ),
}


def run_for(system: System, program: str, *words: str, environment: dict[str, str]) -> str:
    """Run a program in an interpreter of its own, as the benchmark does, and return what it printed."""
    for name in system.needs:
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -e '.[bench]'")
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=ROOT,
        env={**os.environ, **dict(system.environment), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("broker", "module"),
    list(APPLICATIONS),
)
def test_each_system_has_an_application_and_something_to_send(broker: str, module: str, tmp_path: Path) -> None:
    program = f"from bench.peers import {module} as application; print(application.send.__name__)"
    environment = {"BENCH_BROKER": URLS[broker], "BENCH_COUNTER": str(tmp_path / "counter")}
    assert run_for(APPLICATIONS[broker, module], program, environment=environment) == "send"


@pytest.mark.parametrize("name", READERS)
def test_workers_are_started_with_words_that_their_programs_know(name: str) -> None:
    started = [(system, system.worker(2, None)) for _, system in SYSTEMS]
    assert {(command[0], command[1]) for _, command in started} == {("-m", reader) for reader in READERS}
    mine = [(system, command[2:]) for system, command in started if command[1] == name]
    assert all(f"bench.peers.{system.module}" in " ".join(words) for system, words in mine)
    program = (
        f"import json, sys\n{READERS[name]}\nfor words in json.loads(sys.argv[1]): print(read(words) or '', end='')"
    )
    assert run_for(mine[0][0], program, json.dumps([words for _, words in mine]), environment={}) == ""


def test_the_floor_compiles_without_a_warning(tmp_path: Path) -> None:
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "bench/floor.c", "-o", str(tmp_path / "floor"), "-lrabbitmq"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
