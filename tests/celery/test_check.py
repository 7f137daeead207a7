"""`fastq check`: each task's path and why, and the settings that are unknown, not carried or risky."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import celery
import pytest
from celery import _state

from fastq.celery.checking.check import check, unknown_settings
from fastq.celery.checking.report import NOTE, Finding, Report, TaskPath
from fastq.cli import Globals
from fastq.cli.check import command
from fastq.cli.errors import run_guarded
from fastq.errors import SettingsError


@pytest.fixture(autouse=True, scope="module")
def no_tasks_of_others(no_task_leaks: None) -> None:
    """Applications have only Celery's own tasks beside theirs, whatever other test files have defined."""
    own = {each for each in _state._on_app_finalizers if each.__module__ == "celery.app.builtins"}
    _state._on_app_finalizers.intersection_update(own)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "CELERY_BROKER_READ_URL"):
        monkeypatch.delenv(name, raising=False)


def app_with(**conf: Any) -> celery.Celery:
    """Return an application with one task."""
    app = celery.Celery("proj", broker="amqp://localhost//", set_as_current=False)
    app.conf.update(conf)

    @app.task(name="proj.add", shared=False)
    def add(x: int, y: int) -> int:
        return x + y

    return app


def found(app: celery.Celery, kind: str) -> dict[str, str]:
    return {each.name: each.text for each in check(app).findings if each.kind == kind}


# --- tasks


def test_a_plain_application_is_fast_and_has_no_findings() -> None:
    report = check(app_with())
    assert report.tasks == [TaskPath("proj.add")]
    assert report.findings == []
    assert report.is_ok
    assert report.application == f"proj (Celery {celery.__version__})"
    assert report.broker == "amqp://localhost//"
    assert report.results == "disabled"


def test_a_task_that_is_not_fast_says_why() -> None:
    app = app_with(result_backend="redis://localhost/1", result_serializer="yaml")

    @app.task(name="proj.mail", ignore_result=True, shared=False)
    def mail() -> None:
        pass

    assert check(app).tasks == [TaskPath("proj.add", ("results are serialized by 'yaml'",)), TaskPath("proj.mail")]


def test_passwords_are_not_shown() -> None:
    urls = {"broker_url": "amqp://u:secret@localhost//", "result_backend": "redis://:secret@localhost/1"}
    report = check(app_with(**urls))
    assert "secret" not in json.dumps(report.as_json())
    assert "secret" not in "\n".join(report.lines())
    assert (report.broker, report.results) == ("amqp://u:**@localhost//", "redis://:**@localhost/1")


def test_what_holds_for_every_task_is_said_once() -> None:
    paths = [TaskPath("a", ("all", "own")), TaskPath("b", ("all",))]
    lines = list(Report("app", "b", "r", paths).lines())
    assert lines.count("  every task: all") == 1
    assert [line.strip() for line in lines if line.strip() in ("all", "own")] == ["own"]
    assert "Tasks: 0 on the fast path, 2 on the compatible path" in lines


# --- names


class Django:
    """A settings module with other people's names in it."""

    CELERY_BROKER_URL = "amqp://localhost//"
    CELERY_TASK_SERIALISER = "json"
    CELERY_TASK_RESULT_EXPIRES = 60
    CELERY_FASTQ_RELIABLE = True
    CELERY_FASTQ_RELIABEL = True
    CELERY_REDBEAT_LOCK = 3
    TASK_FORCE = "none of Celery's"
    task_tracks_started = True


def test_names_under_a_namespace_are_judged() -> None:
    app = celery.Celery("proj", set_as_current=False)
    app.config_from_object(Django, namespace="CELERY")
    assert {each.name: (each.kind, each.text) for each in unknown_settings(app)} == {
        "CELERY_TASK_SERIALISER": ("unknown", "no setting has this name; did you mean CELERY_TASK_SERIALIZER?"),
        "CELERY_FASTQ_RELIABEL": ("unknown", "no setting has this name; did you mean CELERY_FASTQ_RELIABLE?"),
        "task_tracks_started": ("unknown", "no setting has this name; did you mean task_track_started?"),
        "CELERY_REDBEAT_LOCK": ("note", "neither Celery nor fastq knows it; another package may"),
    }


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"task_serialiser": "json"}, {"task_serialiser": "task_serializer"}),
        ({"timezoen": "UTC"}, {"timezoen": "timezone"}),
        ({"CELERYD_PREFETCH_MULTIPLYER": 1}, {"CELERYD_PREFETCH_MULTIPLYER": "CELERYD_PREFETCH_MULTIPLIER"}),
        ({"task_serializer": "json", "mine": 1, "ONCE": {}}, {}),
        ({"CELERY_ACKS_LATE": True}, {}),
    ],
)
def test_a_slip_is_named_with_the_name_that_was_meant(source: dict[str, Any], expected: dict[str, str]) -> None:
    app = celery.Celery("proj", set_as_current=False)
    app.config_from_object(source)
    slips = {each.name: each.text for each in unknown_settings(app) if each.kind == "unknown"}
    assert slips == {name: f"no setting has this name; did you mean {meant}?" for name, meant in expected.items()}


def test_a_transport_option_that_the_broker_does_not_have_is_named() -> None:
    app = app_with(broker_transport_options={"visibility_timout": 60, "master_name": "m"})
    app.conf.broker_url = "redis://h"
    assert found(app, "unknown") == {
        "broker_transport_options['visibility_timout']": "not an option of redis://; did you mean 'visibility_timeout'?"
    }
    app.conf.broker_url = "amqp://h"
    assert "broker_transport_options['master_name']" in found(app, "unknown")


def test_names_of_a_module_that_do_not_look_like_settings_are_left_alone() -> None:
    app = celery.Celery("proj", set_as_current=False)
    app.config_from_object(type("Module", (), {"helper": 1, "timezoen": "UTC", "task_routse": {}, "include": []}))
    assert [each.name for each in unknown_settings(app)] == ["task_routse"]


def test_assigned_names_are_judged_too() -> None:
    app = app_with()
    app.conf.worker_prefetch_multiplyer = 1
    assert found(app, "unknown") == {
        "worker_prefetch_multiplyer": "no setting has this name; did you mean worker_prefetch_multiplier?"
    }


# --- values


def test_what_is_not_carried_fails_the_check() -> None:
    report = check(app_with(worker_agent="proj:Agent"))
    assert [(each.kind, each.name) for each in report.findings] == [("not carried", "worker_agent")]
    assert not report.is_ok


def test_a_value_that_the_worker_refuses_fails_the_check() -> None:
    report = check(app_with(task_time_limit=None, broker_heartbeat="fast", task_soft_time_limit=1))
    assert [each.name for each in report.findings if each.kind == "unusable"] == ["broker_heartbeat"]
    assert not report.is_ok


def test_steps_of_the_applications_own_are_named() -> None:
    from celery import bootsteps

    class Alive(bootsteps.StartStopStep):
        pass

    app = app_with()
    app.steps["worker"].add(Alive)
    (text,) = found(app, NOTE).values()
    assert "Alive runs in a thread of its own" in text
    assert found(app, "not carried") == {}


def test_without_a_result_store_there_is_one_error() -> None:
    with pytest.raises(SettingsError, match="result_backend"):
        check(app_with(result_backend="nosuchstore://"))


REMOTE = "amqp://u:pw@rabbit.example.com//"


@pytest.mark.parametrize(
    ("conf", "name"),
    [
        ({"task_acks_late": True}, "task_reject_on_worker_lost"),
        ({"accept_content": ["json", "pickle"]}, "accept_content"),
        ({"accept_content": ["application/x-python-serialize"]}, "accept_content"),
        ({"broker_url": REMOTE}, "broker_url"),
        ({"broker_url": f"amqp://localhost//;{REMOTE}"}, "broker_url"),
        ({"result_backend": "redis://:pw@8.8.8.8/1"}, "result_backend"),
        ({"task_always_eager": True}, "task_always_eager"),
        ({"worker_send_task_events": "false"}, "worker_send_task_events"),
        (
            {
                "broker_url": "redis://localhost/1",
                "task_time_limit": 7200,
                "task_acks_late": True,
                "task_reject_on_worker_lost": True,
            },
            "visibility_timeout",
        ),
    ],
)
def test_a_risk_is_named_and_does_not_fail_the_check(conf: dict[str, Any], name: str) -> None:
    app = app_with(**conf)
    assert list(found(app, "risk")) == [name]
    assert check(app).is_ok


@pytest.mark.parametrize(
    "conf",
    [
        {"task_acks_late": True, "task_reject_on_worker_lost": True},
        {"task_acks_late": True, "fastq_reliable": True},
        {"broker_url": "amqps://u:pw@rabbit.example.com//"},
        {"broker_url": REMOTE, "broker_use_ssl": True},
        {"broker_url": "amqp://u:pw@rabbit//"},
        {"broker_url": "amqp://u:pw@rabbit.svc.cluster.local//"},
        {"broker_url": "amqp://u:pw@10.1.2.3//"},
        {"broker_url": "amqp://u:pw@127.0.0.1//"},
        {"broker_url": "amqp://rabbit.example.com//"},
        {"broker_url": "redis://localhost/1", "task_time_limit": 7200},
        {
            "broker_url": "redis://localhost/1",
            "broker_transport_options": {"visibility_timeout": 9000},
            "task_time_limit": 7200,
            "task_acks_late": True,
            "task_reject_on_worker_lost": True,
        },
    ],
)
def test_what_is_in_order_is_no_risk(conf: dict[str, Any]) -> None:
    assert found(app_with(**conf), "risk") == {}


@pytest.mark.parametrize(
    ("conf", "name"),
    [
        ({"result_backend": "rpc://"}, "result_backend"),
        ({"result_backend": "redis://localhost/1", "result_expires": None}, "result_expires"),
        ({"broker_pool_limit": 0}, "broker_pool_limit"),
    ],
)
def test_a_note_is_made_of_what_may_be_meant(conf: dict[str, Any], name: str) -> None:
    assert list(found(app_with(**conf), "note")) == [name]
    assert check(app_with(**conf)).is_ok


def test_a_long_list_of_tasks_is_cut() -> None:
    app = app_with(task_acks_late=True)

    def other() -> None:
        pass

    for number in range(4):
        app.task(name=f"proj.t{number}", shared=False)(other)
    assert found(app, "risk")["task_reject_on_worker_lost"].startswith(
        "proj.add, proj.t0, proj.t1 and 2 more: acks_late"
    )


# --- the command

CELERY_PROJECT = """
from celery import Celery
app = Celery("proj", broker="amqp://localhost//", {more})
@app.task
def add(x, y):
    return x + y
"""

FASTQ_PROJECT = """
from fastq import FastQ
app = FastQ("proj", broker_url="memory://")
@app.task
def add(x, y):
    return x + y
"""


def run_check(folder: Path, source: str, *arguments: str) -> tuple[int, str]:
    """Run the command on a project in a process of its own; return its exit code and what it printed."""
    (folder / "proj.py").write_text(source)
    program = (
        "import sys; from fastq.cli import Globals; from fastq.cli.check import command; "
        "from fastq.cli.errors import run_guarded; sys.exit(run_guarded("
        "lambda: command.main(sys.argv[1:], obj=Globals(app='proj'), standalone_mode=False)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_celery_project_that_is_in_order_exits_with_0(tmp_path: Path) -> None:
    code, text = run_check(tmp_path, CELERY_PROJECT.format(more=""))
    assert code == 0, text
    assert "Tasks: 1 on the fast path, 0 on the compatible path" in text
    assert "fast        proj.add" in text


def test_a_slip_exits_with_1_and_json_says_the_same(tmp_path: Path) -> None:
    source = CELERY_PROJECT.format(more="task_serialiser='json'")
    code, text = run_check(tmp_path, source)
    assert code == 1, text
    assert "unknown  task_serialiser: no setting has this name; did you mean task_serializer?" in text
    code, text = run_check(tmp_path, source, "--json")
    report = json.loads(text)
    assert code == 1
    assert report["ok"] is False
    assert report["tasks"] == [{"name": "proj.add", "path": "fast", "reasons": []}]
    assert [each["name"] for each in report["findings"]] == ["task_serialiser"]


def test_a_fastq_project_has_fast_tasks_only_and_needs_no_celery(tmp_path: Path) -> None:
    (tmp_path / "celery.py").write_text("raise ImportError('Celery is not installed')")
    code, text = run_check(tmp_path, FASTQ_PROJECT, "--json")
    assert code == 0, text
    report = json.loads(text)
    assert report["application"] == "proj (FastQ)"
    assert [(each["name"], each["path"]) for each in report["tasks"]] == [("proj.add", "fast")]
    assert "compatible path)" not in run_check(tmp_path, FASTQ_PROJECT)[1]  # a call with a callback is rejected


def test_a_fastq_project_hears_of_a_transport_option_that_its_broker_does_not_have(tmp_path: Path) -> None:
    source = f"{FASTQ_PROJECT}\napp.conf.update(broker_transport_options={{'queue_order_stratgy': 'sorted'}})\n"
    code, text = run_check(tmp_path, source)
    assert code == 1
    assert "queue_order_stratgy" in text


def test_a_module_of_tasks_that_does_not_import_is_one_line(tmp_path: Path) -> None:
    code, text = run_check(tmp_path, CELERY_PROJECT.format(more="include=['no_such_module']"))
    assert code != 0
    assert "no_such_module" in text
    assert "Traceback" not in text


def test_without_an_application_there_is_nothing_to_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(lambda: command.main([], obj=Globals(), standalone_mode=False)) == 2
    assert "no application given" in capsys.readouterr().err


def test_a_report_without_findings_has_no_empty_section() -> None:
    assert "Settings" not in list(Report("app", "b", "r", []).lines())
    assert "Settings" in list(Report("app", "b", "r", [], [Finding("note", "n", "t")]).lines())
