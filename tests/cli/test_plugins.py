"""A broker and a store of somebody else's, by ``module:NAME`` and by entry point: found, and used by each command."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fastq.brokers import find_broker
from fastq.errors import SettingsError
from fastq.results import find_store
from tests import ROOT
from tests.support.forked import run_command
from tests.support.worker_process import WorkerProcess
from tests.toys import renamed

SOURCE = """
from fastq import FastQ
app = FastQ("tasks", task_queues=["celery"])
@app.task
def add(a, b): return a + b
"""


def write_package(site: Path, name: str, **groups: str) -> None:
    """Write an installed distribution that has entry points: the group's name, and the line that it has."""
    folder = site / f"{name}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("".join(f"[fastq.{group}]\n{line}\n" for group, line in groups.items()))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that packages are installed in."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    return site


# --- entry points


def test_a_scheme_is_an_entry_points_name(site: Path) -> None:
    line = "renamed = tests.toys.renamed:{}"
    write_package(site, "toy", brokers=line.format("BROKER"), result_stores=line.format("STORE"))
    assert find_broker("renamed://place") is renamed.BROKER
    assert find_broker("RENAMED://place;renamed://other") is renamed.BROKER
    assert find_store("renamed://place") is renamed.STORE


@pytest.mark.parametrize("name", ["Renamed", "re-named", "re.named+x"])
def test_an_entry_point_may_have_any_name_that_a_scheme_may_have(site: Path, name: str) -> None:
    write_package(site, "toy", brokers=f"{name} = tests.toys.renamed:BROKER")
    assert find_broker(f"{name.lower()}://place") is renamed.BROKER


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("nothing_of_that_name:BROKER", "No module named 'nothing_of_that_name'"),
        ("tests.toys.renamed:NOTHING", "no attribute 'NOTHING'"),
        ("tests.toys.renamed:STORE", "is a Store; expected a fastq.brokers.Broker"),
        ("toy_broken:BROKER", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_entry_point_that_fails_is_told_with_its_package(site: Path, value: str, problem: str) -> None:
    (site / "toy_broken.py").write_text("1 / 0\n")
    write_package(site, "toy", brokers=f"mine = {value}")
    with pytest.raises(SettingsError) as caught:
        find_broker("mine://user:sesame@place")
    for words in (repr(value), "entry point 'mine' of toy", problem):
        assert words in str(caught.value)
    assert "sesame" not in str(caught.value)


def test_what_is_built_in_is_not_replaced(site: Path) -> None:
    write_package(site, "toy", brokers="redis = tests.toys.renamed:BROKER")
    assert find_broker("redis://localhost") is not renamed.BROKER


def test_a_misspelt_name_of_an_entry_point_is_told_what_was_meant(site: Path) -> None:
    write_package(site, "toy", brokers="renamed = tests.toys.renamed:BROKER")
    with pytest.raises(SettingsError, match=r"no broker is known for renamd://; did you mean renamed://\?"):
        find_broker("renamd://place")


# --- commands


class Place:
    """A project whose broker and store are somebody else's."""

    def __init__(self, folder: Path, broker: str, backend: str, site: Path) -> None:
        self.folder, self.broker, self.backend = folder, broker, backend
        (folder / "tasks.py").write_text(SOURCE)
        self.environment = {
            "FASTQ_BROKER_URL": broker,
            "FASTQ_RESULT_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join(map(str, (folder, site, ROOT))),
        }

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run_command("fastq", ["-A", "tasks", *words], self.folder, {**os.environ, **self.environment})


@pytest.fixture(params=["module:NAME", "entry point"])
def place(request: pytest.FixtureRequest, tmp_path: Path, site: Path) -> Place:
    schemes = ("tests.toys.renamed:BROKER", "tests.toys.renamed:STORE")
    if request.param == "entry point":
        line = "renamed = tests.toys.renamed:{}"
        write_package(site, "toy", brokers=line.format("BROKER"), result_stores=line.format("STORE"))
        schemes = ("renamed", "renamed")
    folder = tmp_path / "project"
    folder.mkdir()
    return Place(folder, f"{schemes[0]}:///{folder}/messages.db", f"{schemes[1]}:///{folder}/results.db", site)


def test_a_worker_runs_what_is_called(place: Place, start_worker: Callable[..., WorkerProcess]) -> None:
    worker = start_worker("-c", "1", source=SOURCE, env=place.environment)
    called = place.run("call", "tasks.add", "-a", "[1, 2]", "--wait", "20")
    assert called.stdout.split()[-1] == "3", called.stderr
    task_id = called.stdout.split()[0]
    again = place.run("result", task_id)
    assert again.stdout.split() == ["3"], again.stderr
    assert place.broker.partition("://")[0] in worker.log()
    assert worker.stop() == 0
    assert "Traceback" not in worker.log()


def test_queues_are_purged(place: Place) -> None:
    for _ in range(3):
        assert place.run("call", "tasks.add", "-a", "[1, 2]").returncode == 0
    purged = place.run("purge", "-f")
    assert (purged.returncode, "3 messages" in purged.stdout) == (0, True), purged.stdout + purged.stderr


@pytest.mark.parametrize("words", [("status",), ("inspect", "ping"), ("control", "heartbeat"), ("events", "-d")])
def test_what_needs_remote_control_is_refused_in_one_line(place: Place, words: tuple[str, ...]) -> None:
    refused = place.run(*words)
    assert refused.returncode == 78
    scheme = place.broker.partition("://")[0]
    assert f"{scheme}:// carries no remote control" in refused.stderr
    assert refused.stderr.count("\n") == 1, refused.stderr


def test_a_report_and_a_check_name_the_broker(place: Place) -> None:
    report = place.run("report")
    scheme = place.broker.partition("://")[0]
    assert f"transport:{scheme} " in report.stdout, report.stderr
    check = place.run("check")
    assert "Traceback" not in check.stderr + check.stdout


def test_an_option_that_the_broker_has_not_is_told(place: Place, start_worker: Callable[..., WorkerProcess]) -> None:
    source = SOURCE.replace('"tasks",', '"tasks", broker_transport_options={"sped": 1},')
    worker = start_worker("-c", "1", source=source, env=place.environment)
    assert "did you mean 'speed'?" in worker.log()
