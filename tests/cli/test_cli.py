"""The command line: what it accepts, what it refuses and how, and the exit code that tells a supervisor why."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fastq import FastQ, __version__
from fastq.cli import COMMANDS
from fastq.cli.errors import DEBUG_VARIABLE, Failure, run_guarded
from fastq.errors import ConnectionLost, FastqError, LocalProtocolError, PublishError, ResultTimeout, SettingsError
from fastq.worker.process.exitcodes import MEANINGS, CannotCreate
from fastq.worker.window import UNBOUNDED
from tests import ROOT
from tests.support.forked import run_command
from tests.support.worker_process import WorkerProcess

SHOP = """
from fastq import FastQ
app = FastQ("shop", broker="sqlite:///shop.db")

@app.task
def add(x, y):
    return x + y

@app.task
def fail():
    raise KeyError("no such thing")
"""


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on standard error; fails when there is more than one, or a traceback."""
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err.rstrip("\n")


Run = Callable[..., Done]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with an application in the module ``shop``."""
    (tmp_path / "shop.py").write_text(SHOP)
    return tmp_path


@pytest.fixture
def fastq(project: Path) -> Run:
    """A function that runs ``fastq`` in the project and returns what came of it."""

    def run(*arguments: str, stdin: str = "", timeout_s: float = 60, **environ: str) -> Done:
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("FASTQ", "CELERY", "C_FORCE"))
        }
        for name in ("APP", "BROKER_URL", "RESULT_BACKEND", "CONFIG_MODULE", "NO_COLOR"):
            clean.pop(name, None)
        environment = {**clean, "PYTHONPATH": str(ROOT), **environ}
        done = run_command("fastq", arguments, project, environment, stdin, timeout_s)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


# -- the group


def test_version_imports_neither_the_loop_nor_the_compiled_core() -> None:
    code = (
        "import sys; from fastq.cli import run; code = run(['--version']); "
        "print(code, sorted({'uvloop', 'asyncio', 'orjson', 'fastq._core', 'fastq.app'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [__version__, "0 []"]


@pytest.mark.smoke
def test_help_names_every_command(fastq: Run) -> None:
    done = fastq("--help")
    assert done.code == 0
    assert all(f"  {name} " in done.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(fastq: Run, name: str) -> None:
    done = fastq(name, "--help")
    assert done.code == 0
    assert done.out.startswith(f"Usage: fastq {name}")


def test_an_unknown_option_is_a_usage_error(fastq: Run) -> None:
    done = fastq("-A", "shop", "worker", "--bogus")
    assert done.code == 2
    assert "No such option" in done.err
    assert "--bogus" in done.err


@pytest.mark.parametrize("source", [SHOP, "import celery\napp = celery.Celery('proj')\n"], ids=["fastq", "celery"])
def test_a_mistyped_option_names_the_right_one(fastq: Run, project: Path, source: str) -> None:
    write(project, "proj.py", source)
    for words in (["--concurency", "2"], ["--concurency=2"]):
        done = fastq("-A", "proj", "worker", *words)
        assert done.code == 2
        assert done.err.startswith("Usage: fastq worker [OPTIONS] [-- SETTING=VALUE ...]\n")
        assert re.search(r"No such option:? '?--concurency'?\.? Did you mean '?--concurrency'?\?", done.err), done.err


def test_a_wrong_value_of_an_application_s_own_option_is_one_of_the_command(fastq: Run, project: Path) -> None:
    source = "import celery, click\napp = celery.Celery('proj')\n"
    write(project, "proj.py", f"{source}app.user_options['worker'].add(click.Option(['--magic'], type=int))\n")
    done = fastq("-A", "proj", "worker", "--magic", "x")
    assert (done.code, done.err.startswith("Usage: fastq worker [OPTIONS]")) == (2, True)
    assert "Invalid value for '--magic'" in done.err
    assert "Did you mean" in fastq("-A", "proj", "worker", "--magik", "1").err


def test_an_application_that_was_forgotten_is_said_to_be_the_command(fastq: Run) -> None:
    done = fastq("-A", "worker", "-l", "INFO")
    assert done.code == 2
    assert "-A has taken 'worker' as the application's name" in done.error
    assert "Name the application: fastq -A <module> worker -l ..." in done.error
    assert "has taken" not in fastq("-A", "shop", "-l", "INFO").err


def test_a_mistyped_command_names_the_right_one(fastq: Run) -> None:
    done = fastq("wroker")
    assert done.code == 2
    assert "'worker'" in done.err


def test_a_command_of_celery_s_that_is_not_carried_says_so(fastq: Run) -> None:
    done = fastq("-A", "shop", "beat")
    known = ", ".join(COMMANDS)
    assert (done.code, done.error) == (
        2,
        f"Error: command 'beat' is not carried by this version of fastq; it has {known} [exit 2: wrong usage]",
    )


@pytest.mark.parametrize(
    "options",
    [
        ["-B"],
        ["-s", "beat.db"],
        ["--scheduler", "x:Y"],
    ],
    ids=" ".join,
)
def test_an_option_of_celery_s_that_is_not_carried_says_so_in_one_line(fastq: Run, options: list[str]) -> None:
    done = fastq("-A", "shop", "worker", *options)
    assert done.code == 2
    assert options[0].split("=")[0] in done.error
    assert "is not carried by this version of fastq; " in done.error
    assert "remove it" in done.error or "give a fixed number" in done.error


def test_a_python_counts_only_for_a_worker_that_is_detached(fastq: Run) -> None:
    done = fastq("-A", "shop", "worker", "--executable", "/no/such/python", "-c", "0")
    assert (done.code, "--concurrency is 0" in done.error) == (78, True)


def test_a_loader_is_for_celery_applications(fastq: Run) -> None:
    done = fastq("--loader", "default", "-A", "shop", "purge", "-f")
    assert (done.code, "option --loader is for Celery applications" in done.error) == (2, True)


def test_a_report_names_versions_and_settings(fastq: Run) -> None:
    done = fastq("-A", "shop", "report")
    assert done.code == 0, done.err
    assert f"software -> fastq:{__version__}" in done.out
    assert "broker_url: 'sqlite:///shop.db'" in done.out


def test_an_application_after_the_command_is_told_its_place(fastq: Run) -> None:
    done = fastq("worker", "-A", "shop")
    assert (done.code, done.error) == (
        2,
        "Error: option -A stands before the command: fastq -A shop worker ... [exit 2: wrong usage]",
    )


# -- finding the application


def send_through(fastq: Run, app: str) -> Done:
    """Use an application in the cheapest way that loads it: ask it for the result of a task nobody has sent."""
    return fastq("-A", app, "result", "no-such-id")


@pytest.mark.parametrize("spec", ["shop", "shop:app", "shop.app", "pack", "pack.inner:holder.queue", "odd", "sub"])
def test_an_application_is_found(fastq: Run, project: Path, spec: str) -> None:
    write(project, "pack/__init__.py", "")
    write(project, "pack/fastq.py", SHOP)
    write(project, "pack/inner.py", SHOP + "class holder: queue = app\n")
    write(project, "odd.py", SHOP.replace("app", "application"))
    write(project, "sub.py", SHOP.replace("app", "fastq").replace("from fastq import", "from fastq import"))
    done = send_through(fastq, spec)
    assert done.error == (
        f"Error: there are no results here: {project / 'shop.db'} does not exist. "
        "Go to the folder it is in by --workdir [exit 1: failed]"
    )
    assert not (project / "shop.db").exists()


def test_a_result_that_is_not_there_yet_is_a_temporary_failure(fastq: Run) -> None:
    fastq("-A", "shop", "call", "shop.fail")
    assert send_through(fastq, "shop").error == (
        "Error: task no-such-id is not ready (PENDING); give it time with --wait <seconds> "
        "[exit 75: temporary failure, try again]"
    )


def test_no_application_is_a_usage_error_with_the_remedy(fastq: Run) -> None:
    done = fastq("worker")
    assert done.code == 2
    assert "fastq -A <module>[:attribute]" in done.error


@pytest.mark.parametrize("spec", ["nope", "nope.deeper", "nope:app"])
def test_a_module_that_is_not_found_names_itself_and_where_we_looked(fastq: Run, project: Path, spec: str) -> None:
    done = send_through(fastq, spec)
    assert done.code == 2
    assert "was not found" in done.error
    assert str(project) in done.error
    assert "--workdir" in done.error


def test_an_attribute_that_does_not_exist_names_the_one_that_does(fastq: Run) -> None:
    done = send_through(fastq, "shop:queue")
    assert done.code == 2
    assert "has no attribute 'queue' (-A shop:queue); it holds app" in done.error


def test_a_module_without_an_application_says_so(fastq: Run, project: Path) -> None:
    write(project, "empty.py", "x = 1\n")
    assert "holds no application" in send_through(fastq, "empty").error
    assert "is a int, not an application" in send_through(fastq, "empty:x").error
    write(project, "pack/__init__.py", "")
    write(project, "pack/app.py", SHOP)
    assert "in pack/app.py: -A pack.app" in send_through(fastq, "pack").error


@pytest.mark.parametrize(
    ("spec", "remedy"),
    [
        ("shop.py", "-A shop [exit 2"),
        ("./shop", "-A shop [exit 2"),
        ("./shop.py:app", "-A shop:app [exit 2"),
        ("pack/app.py", "-A pack.app [exit 2"),
        ("../elsewhere/shop.py", "Give its folder by --workdir, then -A shop [exit 2"),
    ],
)
def test_a_path_in_place_of_a_module_is_answered_with_the_module(fastq: Run, spec: str, remedy: str) -> None:
    done = send_through(fastq, spec)
    assert (done.code, "is a path; -A takes a module" in done.error) == (2, True)
    assert remedy in done.error


@pytest.mark.parametrize("spec", ["fastq", "fastq:app", "fastq.tasks"])
def test_a_project_of_the_library_s_name_is_to_be_renamed(fastq: Run, project: Path, spec: str) -> None:
    done = fastq("-A", spec, "status")
    assert done.code == 2
    assert f"-A {spec.partition(':')[0]} is the library itself" in done.error
    assert done.error.endswith("rename it [exit 2: wrong usage]")


def test_of_several_applications_one_must_be_named_or_the_choice_is_said(fastq: Run, project: Path) -> None:
    write(project, "two.py", SHOP.replace("app", "one") + SHOP.replace("app", "two") + "alias = one\n")
    done = send_through(fastq, "two")
    assert (done.code, "Name one of them: -A two:one, -A two:two [" in done.error) == (2, True)
    write(project, "two.py", SHOP + SHOP.replace("app", "two"))
    assert "taken: <FastQ shop: 2 tasks>. The others: -A two:two\n" in send_through(fastq, "two").err


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("import fastq\n\n1 / 0\n", "ZeroDivisionError: division by zero", 3),
        ("x = 1\ndef f(:\n", "SyntaxError: invalid syntax", 2),
        ("import not_installed_here\n", "ModuleNotFoundError: No module named 'not_installed_here'", 1),
        ("from fastq import nothing\n", "ImportError: cannot import name 'nothing' from 'fastq'", 1),
        ("import sys\nsys.exit('no thanks')\n", "SystemExit: no thanks", 2),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines", 1),
    ],
    ids=["raises", "syntax", "missing module", "missing name", "exits", "two lines"],
)
def test_a_module_that_does_not_import_names_error_and_place(
    fastq: Run, project: Path, text: str, what: str, line: int
) -> None:
    write(project, "broken.py", text)
    done = send_through(fastq, "broken")
    assert done.code == 1
    assert done.error.startswith(f"Error: module 'broken' does not import (-A broken): {what}")
    assert f", at {project / 'broken.py'}:{line}. " in done.error


def test_the_place_is_in_the_project_even_when_a_library_raised(fastq: Run, project: Path) -> None:
    write(project, "broken.py", "import json\n\nsettings = json.loads('{')\n")
    assert f"{project / 'broken.py'}:3. " in send_through(fastq, "broken").error


def test_a_wrong_setting_in_a_module_is_bad_configuration(fastq: Run, project: Path) -> None:
    write(project, "broken.py", "from fastq import FastQ\napp = FastQ('x', task_default_queu='y')\n")
    done = send_through(fastq, "broken")
    assert done.code == 78
    assert "unknown setting 'task_default_queu'; did you mean 'task_default_queue'?" in done.error
    assert "broken.py:2" in done.error


@pytest.mark.parametrize(("flag", "environ"), [(["--debug"], {}), ([], {DEBUG_VARIABLE: "1"})])
def test_the_traceback_is_shown_when_asked_for(
    fastq: Run, project: Path, flag: list[str], environ: dict[str, str]
) -> None:
    write(project, "broken.py", "1 / 0\n")
    done = fastq(*flag, "-A", "broken", "worker", **environ)
    assert done.code == 1
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("Error: module 'broken' does not import")


def test_another_working_directory_is_where_modules_are_found(fastq: Run, project: Path) -> None:
    write(project, "deep/far.py", SHOP)
    assert "deep/shop.db does not exist" in fastq("--workdir", "deep", "-A", "far", "result", "x").error
    done = fastq("--workdir", "deeper", "-A", "far", "result", "x")
    assert done.code == 78
    assert "--workdir 'deeper': No such file or directory" in done.error


# -- options from the environment and configuration


def test_options_come_from_the_environment_as_well(fastq: Run) -> None:
    assert "no results here" in fastq("result", "x", FASTQ_APP="shop").error
    assert "no results here" in fastq("result", "x", APP="shop").error
    done = fastq("worker", FASTQ_APP="shop", FASTQ_WORKER_POOL="custom")
    assert "no pool is known by the name 'custom'" in done.error


def test_a_wrong_value_from_the_environment_names_its_variable(fastq: Run) -> None:
    for variable in ("FASTQ_WORKER_CONCURRENCY", "CELERY_WORKER_TIME_LIMIT"):
        done = fastq("-A", "shop", "worker", **{variable: "x"})
        assert (done.code, f"Invalid value for {variable}: 'x' is not" in done.err) == (2, True), done.err
    assert "Invalid value for '-c'" in fastq("-A", "shop", "worker", "-c", "x", FASTQ_WORKER_CONCURRENCY="x").err


def test_a_broker_alone_is_enough_to_send_and_ask(fastq: Run) -> None:
    sent = fastq("-b", "sqlite:///other.db", "call", "any.name")
    assert sent.code == 0, sent.err
    done = fastq("result", sent.out.strip(), BROKER_URL="sqlite:///other.db")
    assert "not ready (PENDING)" in done.error


def test_a_configuration_module_is_read(fastq: Run, project: Path) -> None:
    write(project, "conf.py", "task_default_queue = 'parcels'\n")
    write(project, "plain.py", SHOP)
    done = fastq("--config", "conf", "-A", "plain", "purge", "-f")
    assert done.code == 0, done.err
    assert "Purged no messages from 1 known task queue." in done.out
    write(project, "conf.py", "task_default_queue = 7\n")
    assert fastq("--config", "conf", "-A", "plain", "purge", "-f").code == 78
    assert fastq("--config", "nope", "-A", "plain", "purge", "-f").code == 2


# -- sending, reading, purging


def test_call_prints_the_id_and_the_queue_holds_the_message(fastq: Run) -> None:
    done = fastq("-A", "shop", "call", "shop.add", "-a", "[1]", "-k", '{"y": null}', "--countdown", "60")
    assert done.code == 0, done.err
    assert len(done.out.strip()) == 36
    assert fastq("-A", "shop", "purge", "-f").out == "Purged 1 message from 1 known task queue.\n"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["-a", "{}"], "'{}' is not a JSON array"),
        (["-a", "[1,"], "'[1,' is not JSON"),
        (["-k", "[]"], "'[]' is not a JSON object"),
        (["--eta", "tomorrow"], "'tomorrow' is not a moment such as"),
        (["--expires", "later"], "'later' is not a moment such as"),
        (["--wait", "long"], "'long' is not a number of seconds"),
        (["--countdown", "x"], "'x' is not a valid float"),
    ],
)
def test_a_wrong_value_for_call_is_a_usage_error(fastq: Run, options: list[str], complaint: str) -> None:
    done = fastq("-A", "shop", "call", "shop.add", *options)
    assert done.code == 2
    assert complaint in done.err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["shop.ad"], "no task 'shop.ad' in <FastQ shop: 2 tasks>; did you mean 'shop.add'? For one that only"),
        (["add"], "did you mean 'shop.add'?"),
        (["mail.send"], "it has shop.add, shop.fail. For one that only"),
        (
            ["shop.add", "-a", "[1]"],
            "'shop.add' cannot be called with these arguments: missing a required argument: 'y'",
        ),
        (["shop.fail", "--eta", "2030-01-31T12:00:00"], "eta is 2030-01-31 12:00:00, which could be any zone's time"),
    ],
)
def test_a_call_that_nobody_could_run_is_refused_before_it_is_sent(
    fastq: Run, project: Path, options: list[str], complaint: str
) -> None:
    done = fastq("-A", "shop", "call", *options)
    assert (done.code, done.out) == (2, "")
    assert complaint in done.error
    assert not (project / "shop.db").exists()


def test_a_call_that_makes_the_database_says_so(fastq: Run, project: Path) -> None:
    done = fastq("-A", "shop", "call", "shop.fail")
    assert (done.code, f"{project / 'shop.db'} did not exist; it is new and empty now" in done.error) == (0, True)
    assert fastq("-A", "shop", "call", "shop.fail").err == ""


def test_a_queue_that_nobody_reads_is_said_by_check_worker_and_status(
    start_worker: Callable[..., WorkerProcess], fastq: Run, project: Path
) -> None:
    queues = "app.conf.task_queues = ['a', 'b']\n@app.task(queue='b')\ndef fine(): ...\n"
    source = SHOP.replace("shop.db", str(project / "shop.db")) + queues
    write(project, "tasks.py", source)
    checked = fastq("-A", "tasks", "check").out
    assert "risk  queue 'celery' is read by no worker without -Q: calls of tasks.add, tasks.fail go there" in checked
    log = start_worker("-c", "1", source=source).log()
    assert "queue 'celery' is not read: calls of tasks.add, tasks.fail go there and wait. Add it to task_queues" in log
    assert "'b' is not read" not in log
    vain = fastq("-A", "tasks", "call", "tasks.fail", "--wait", "0.2")
    assert (vain.code, "; it went to queue 'celery', which none of those that are up reads" in vain.error) == (75, True)
    asked = fastq("-A", "tasks", "status", "-d", "no@vm")
    assert (asked.code, "no worker named no@vm is up; up: fastq@" in asked.error) == (69, True)
    status = fastq("-A", "tasks", "status")
    assert (status.code, "Queue 'celery' is read by none of them: calls of tasks.add" in status.error) == (0, True)
    assert "not read" not in start_worker("-c", "1", "-Q", "celery", source=source).log()
    assert fastq("-A", "tasks", "status").err == ""


def test_an_unknown_serializer_names_the_known_ones(fastq: Run) -> None:
    done = fastq("-A", "shop", "call", "shop.fail", "--serializer", "xml")
    assert done.code != 0
    assert "json" in done.error


def test_call_waits_no_longer_than_it_was_told_to(fastq: Run) -> None:
    done = fastq("-A", "shop", "call", "shop.add", "-a", "[1, 2]", "--wait", "0.2")
    assert done.code == 75
    assert len(done.out.strip()) == 36


@pytest.mark.parametrize(("answer", "code"), [("yes\n", 0), ("y\n", 1), ("\n", 1), ("", 1)])
def test_purge_asks_for_a_typed_yes(fastq: Run, answer: str, code: int) -> None:
    fastq("-A", "shop", "call", "shop.fail")
    done = fastq("-A", "shop", "purge", stdin=answer)
    assert done.code == code
    assert "every task that waits in celery" in done.err
    left = fastq("-A", "shop", "purge", "-f").out
    assert left == f"Purged {'no messages' if code == 0 else '1 message'} from 1 known task queue.\n"


def test_purge_takes_the_queues_it_is_given(fastq: Run) -> None:
    fastq("-A", "shop", "call", "shop.fail", "--queue", "a")
    fastq("-A", "shop", "call", "shop.fail", "--queue", "b")
    assert "Purged 1 message from 1 " in fastq("-A", "shop", "purge", "-f", "-Q", "a,b", "-X", "b").out
    assert "Purged 1 message from 2 known task queues." in fastq("-A", "shop", "purge", "-f", "-Q", "a, b").out
    done = fastq("-A", "shop", "purge", "-f", "-Q", "a", "-X", "a")
    assert (done.code, "no queue is left" in done.error) == (78, True)


def test_a_result_that_only_its_sender_gets_is_not_waited_for(fastq: Run) -> None:
    done = fastq("-b", "amqp://127.0.0.1:1//", "--result-backend", "rpc://", "result", "x", "--wait", "60")
    assert (done.code, "only the process that sent a task gets its result" in done.error) == (2, True)


def test_results_of_an_application_that_stores_none_cannot_be_read(fastq: Run) -> None:
    done = fastq("-b", "memory://", "--result-backend", "disabled", "result", "x")
    assert (done.code, "stores no results" in done.error) == (1, True)


# -- a broker that is not there


def test_a_broker_that_is_down_is_a_temporary_failure(fastq: Run) -> None:
    for command in (["status"], ["purge", "-f"]):
        done = fastq("-b", "amqp://user:secret@127.0.0.1:1//", *command)
        assert done.code == 75, done.err
        assert "amqp://user:**@127.0.0.1:1/" in done.error
        assert "secret" not in done.err


def test_an_unknown_kind_of_broker_names_the_known_ones(fastq: Run) -> None:
    done = fastq("-b", "carrier-pigeon://coop", "purge", "-f")
    assert done.code == 78
    assert "amqp" in done.error


# -- status


def test_status_without_workers_says_so_with_celery_s_exit_code(fastq: Run) -> None:
    done = fastq("-A", "shop", "status")
    assert done.code == 69
    assert done.error.startswith("Error: no worker is up on ")


def test_status_of_a_memory_broker_cannot_be_asked(fastq: Run) -> None:
    assert "memory://" in fastq("-b", "memory://", "status").error


# -- files and users


def test_a_pid_file_that_cannot_be_written_ends_with_73(fastq: Run) -> None:
    done = fastq("-A", "shop", "worker", "--pidfile", "none/worker.pid")
    assert (done.code, "cannot write pid file 'none/worker.pid'" in done.error) == (73, True)


def test_a_log_file_that_cannot_be_written_ends_with_73(fastq: Run) -> None:
    done = fastq("-A", "shop", "worker", "--logfile", "none/worker.log")
    assert (done.code, "cannot write log file" in done.error) == (73, True)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--umask", "9"], "--umask is '9'; it must be an octal number"),
        (["--uid", "nobody-at-all"], "--uid 'nobody-at-all' is no user of this machine"),
        (["--gid", "no-such-group"], "--gid 'no-such-group' is no group of this machine"),
        (["-c", "0"], "--concurrency is 0; it must be 1 or more"),
        (["--time-limit", "-1"], "--time-limit is -1.0; it must be 0 or more"),
        (["-X", "celery"], "no queue is left: -X excludes celery"),
    ],
)
def test_a_wrong_option_is_bad_configuration_in_one_line(fastq: Run, options: list[str], complaint: str) -> None:
    done = fastq("-A", "shop", "worker", *options)
    assert done.code == 78
    assert complaint in done.error


def test_an_unknown_queue_is_refused_where_queues_are_not_to_be_created(fastq: Run, project: Path) -> None:
    write(project, "strict.py", SHOP + "app.conf.update(task_create_missing_queues=False, task_queues=['a', 'b'])\n")
    done = fastq("-A", "strict", "worker", "-Q", "a,c")
    assert done.code == 78
    assert "unknown queue 'c'; declared: a, b. Add it to task_queues" in done.err


def test_a_module_to_include_that_is_not_there_is_named(fastq: Run, project: Path) -> None:
    done = fastq("-A", "shop", "worker", "-I", "shop,nope")
    assert (done.code, "module 'nope' was not found (-I nope)" in done.error) == (2, True)
    write(project, "inc.py", SHOP + "app.conf.include = ['nope']\n")
    done = fastq("-A", "inc", "worker")
    assert (done.code, "setting 'include' names 'nope', which is not found" in done.error) == (78, True)
    write(project, "pack/__init__.py", "")
    write(project, "pack/tasks.py", "import nope\n")
    write(project, "inc.py", SHOP + "app.conf.include = ['pack.tsks']\n")
    assert "names 'pack.tsks', which is not found; did you mean 'pack.tasks'?" in fastq("-A", "inc", "worker").error
    for setting in ("imports", "include"):
        write(project, "foreign.py", f"from celery import Celery\napp = Celery({setting}=['pack.tsks'])\n")
        for command in ("worker", "check"):
            done = fastq("-A", "foreign", command)
            words = f"setting {setting!r} names 'pack.tsks', which is not found; did you mean 'pack.tasks'?"
            assert (done.code, words in done.error) == (78, True), done.error
    write(project, "inc.py", SHOP + "app.conf.include = ['pack.tasks']\n")
    done = fastq("-A", "inc", "worker")
    assert done.code == 1
    assert "a module of include, imports or autodiscover_tasks does not import: ModuleNotFoundError" in done.error


# -- a worker


def test_the_banner_has_celery_s_shape_and_hides_the_password(
    start_worker: Callable[..., WorkerProcess], project: Path
) -> None:
    source = SHOP.replace("sqlite:///shop.db", "amqp://me:secret@127.0.0.1:1//")
    worker = start_worker("-c", "2", "-n", "w1@%%", "-Q", "a,b", "--compat", source=source, await_ready=False)
    worker.wait_for_log("Cannot connect to")
    log = worker.log()
    assert "secret" not in log
    for line in (
        rf" -------------- w1@% v{re.escape(__version__)}$",
        r"^.{16}\[config\]$",
        r"^.{16}\.> app:         shop$",
        r"^.{16}\.> transport:   amqp://me:\*\*@127\.0\.0\.1:1//$",
        r"^.{16}\.> results:     disabled$",
        r"^.{16}\.> concurrency: 2 \(prefork\)$",
        r"^ -------------- \[queues\]$",
        r"^                \.> a                exchange=a\(direct\) key=a$",
        r"^                \.> b                exchange=b\(direct\) key=b$",
        r"^\[tasks\]\n  \. tasks\.add\n  \. tasks\.fail\n$",
    ):
        assert re.search(line, log, re.M), line


def test_a_quiet_worker_prints_no_banner_and_one_at_warning_no_tasks(
    start_worker: Callable[..., WorkerProcess],
) -> None:
    assert "[config]" not in start_worker(source=SHOP, env={"FASTQ_QUIET": "1"}).log()
    worker = start_worker(source=SHOP, log_level="WARNING", await_ready=False)
    worker.wait_for_log(r"\[queues\]")
    assert "[tasks]" not in worker.log()


def test_a_worker_that_is_told_to_purge_starts_with_empty_queues(
    start_worker: Callable[..., WorkerProcess], fastq: Run, project: Path
) -> None:
    source = SHOP.replace("shop.db", str(project / "shop.db"))
    old = fastq("-b", "sqlite:///shop.db", "call", "tasks.add", "-a", "[1, 2]").out.strip()
    worker = start_worker("--purge", "-c", "1", source=source)
    new = fastq("-b", "sqlite:///shop.db", "call", "tasks.add", "-a", "[3, 4]", "--wait", "20").out.split()
    assert new[1] == "7"
    assert new[0] in worker.log()
    assert old not in worker.log()


def test_call_and_result_show_what_came_of_a_task(
    start_worker: Callable[..., WorkerProcess], fastq: Run, project: Path
) -> None:
    start_worker("-c", "1", source=SHOP.replace("shop.db", str(project / "shop.db")))
    done = fastq("-b", "sqlite:///shop.db", "call", "tasks.add", "-a", '["a", "b"]', "--wait", "20")
    assert (done.code, done.out.split()[1:]) == (0, ["ab"])
    assert fastq("-A", "shop", "result", done.out.split()[0]).out == "ab\n"
    failed = fastq("-b", "sqlite:///shop.db", "call", "tasks.fail", "--wait", "20")
    assert failed.code == 1
    assert failed.error.endswith(" ended as FAILURE: KeyError('no such thing') [exit 1: failed]")
    shown = fastq("-A", "shop", "result", failed.out.strip(), "--traceback")
    assert shown.code == 1
    assert shown.out.startswith("Traceback (most recent call last):")
    assert shown.out.rstrip().endswith("KeyError: 'no such thing'")
    status = fastq("-A", "shop", "status")
    assert (status.code, re.sub(r"@\S+:", "@host:", status.out)) == (0, "->  fastq@host: OK\n\n1 node online.\n")


def test_one_worker_at_a_time_has_the_pid_file(start_worker: Callable[..., WorkerProcess], project: Path) -> None:
    first = start_worker("-c", "1", "--pidfile", str(project / "w.pid"), source=SHOP)
    assert (project / "w.pid").read_text() == f"{first.pid}\n"
    second = start_worker("-c", "1", "--pidfile", str(project / "w.pid"), source=SHOP, await_ready=False)
    assert second.wait() == 73
    assert first.stop() == 0
    assert not (project / "w.pid").exists()


# -- how errors end


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("x"), 78),
        (CannotCreate("x"), 73),
        (ConnectionLost("x"), 75),
        (PublishError("x"), 75),
        (ResultTimeout("x"), 75),
        (LocalProtocolError("x"), 70),
        (FastqError("x"), 1),
        (PermissionError(13, "Permission denied", "file"), 1),
        (Failure("x", 69), 69),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_every_kind_of_error_has_its_exit_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert run_guarded(fail) == code
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    if code != 130:
        assert printed.endswith(f"[exit {code}: {MEANINGS[code]}]\n")


def test_an_error_that_was_not_foreseen_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(lambda: 1 // 0) == 70
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert "Error: internal error, please report it: ZeroDivisionError: " in printed
    assert printed.endswith("[exit 70: internal error]\n")


def test_a_reader_that_goes_away_is_no_error(fastq: Run) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m fastq --help | head -c 1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "U"
    assert done.stderr == ""


# --- the first hour ---------------------------------------------------------------------------------------------------


def test_the_worker_s_help_has_sections(fastq: Run) -> None:
    help_text = fastq("worker", "--help").out
    titles = [line for line in help_text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Options:", "Messages:", "Child processes:", "Time:", "Monitoring:", "Process:"]
    assert f"Messages held per child; 0: {UNBOUNDED:,} in all." in help_text


def test_who_waits_at_an_embedded_broker_without_a_worker_is_told(fastq: Run, project: Path) -> None:
    path = project / "shop.db"
    none_there = fastq("-A", "shop", "status")
    assert none_there.code == 69
    assert f"no worker is up on {path}, and there is no such file. Start one there" in none_there.error
    waiting = fastq("-A", "shop", "call", "shop.add", "--args", "[1, 2]", "--wait", "0.2")
    assert waiting.code == 75
    assert f"Waiting, but no worker is up on {path}; the task runs once one is started" in waiting.err


def test_a_worker_says_that_it_is_ready_what_it_waits_for_and_that_there_are_no_events(project: Path) -> None:
    source = SHOP + "\nimport time\n@app.task\ndef nap(s):\n    print('napping')\n    time.sleep(s)\n"
    worker = WorkerProcess(project, "-c", "1", source=source, log_level="WARNING").start()
    assert "task events: not with this broker" in worker.log()
    client = FastQ("client", broker=f"sqlite:///{project / 'shop.db'}")
    client.send_task("tasks.nap", (1,))
    worker.wait_for_log("napping")
    worker.signal(signal.SIGTERM)
    worker.wait_for_log(r"waiting for running tasks to end: 1, for at most 25 s")
    assert worker.wait() == 0
    again = WorkerProcess(project, "-c", "1", log_level="WARNING").start()
    client.send_task("tasks.nap", (60,))
    again.wait_for_log("napping", count=2)
    again.signal(signal.SIGTERM)
    again.wait_for_log("waiting for running tasks to end: 1", count=2)
    again.signal(signal.SIGTERM)
    assert again.wait() == 1
    assert "the worker stops at once; they are given back: tasks.nap[" in again.log()
    assert "within 25 s" not in again.log()
    client.close()


def test_the_source_folder_says_that_it_is_not_built(tmp_path: Path) -> None:
    (tmp_path / "fastq").mkdir()
    (tmp_path / "fastq" / "__init__.py").write_text((ROOT / "fastq" / "__init__.py").read_text())
    done = subprocess.run(
        [sys.executable, "-c", "import fastq"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert f"ImportError: {tmp_path}/fastq is fastq's source, not built: start Python in another folder" in done.stderr


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
@pytest.mark.parametrize("kind", ["fastq", "celery"])
def test_a_process_that_is_patched_for_green_threads_is_refused(tmp_path: Path, library: str, kind: str) -> None:
    package = tmp_path / library
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "monkey.py").write_text("def is_module_patched(name): return True\n")
    (package / "patcher.py").write_text("def is_monkey_patched(name): return True\n")
    made = "from fastq import FastQ\napp = FastQ('green', broker='redis://127.0.0.1:1/0')\n"
    if kind == "celery":
        made = "import celery\napp = celery.Celery('green', broker='redis://127.0.0.1:1/0')\n"
    (tmp_path / "green.py").write_text(
        f"import {library}.{'monkey' if library == 'gevent' else 'patcher'}\n{made}", encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "fastq", "-A", "green", "worker"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 78, done.stderr
    assert f"this process is monkey-patched by {library}" in done.stderr
    assert "Take the patching out" in done.stderr
    assert f"-P {library} patches the children itself" in done.stderr
    assert "Celery's own worker" not in done.stderr
