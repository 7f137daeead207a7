"""The application: configuration, registry, routing, and the one place where messages leave."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import fastq.app
from fastq import FastQ, Task, current_app, current_task, get_task_logger, shared_task
from fastq.codecs.meta import encode_meta
from fastq.errors import (
    ConnectionLost,
    EncodeError,
    NotRegistered,
    PublishError,
    ResultsDisabled,
    ResultTimeout,
    SettingsError,
)
from fastq.request import Request, pop_request, push_request
from fastq.sending.envelope import PublishRetry
from fastq.sending.routing import NO_ROUTE, Route, Router
from fastq.settings import ENVIRONMENT_NAMES
from tests.support.recording import RecordingPublisher, RecordingStore, body, headers


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in ENVIRONMENT_NAMES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def no_apps_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastq.app, "_joining", [])
    monkeypatch.setattr(fastq.app, "_last_app", None)


def make_app(**settings: Any) -> FastQ:
    app = FastQ("proj", broker="memory://", **settings)
    app.publisher = RecordingPublisher()
    app.store = RecordingStore()
    return app


def sent(app: FastQ) -> RecordingPublisher:
    publisher = app.publisher
    assert isinstance(publisher, RecordingPublisher)
    return publisher


def add(x: int, y: int = 0) -> int:
    return x + y


# --- configuration ----------------------------------------------------------------------------------------------------


def test_settings_come_from_keywords() -> None:
    app = FastQ("proj", broker="amqp://a", backend="rpc://", include=["m"], task_default_queue="q")
    assert (app.conf.broker_url, app.conf.result_backend, app.conf.include) == ("amqp://a", "rpc://", ("m",))
    assert app.conf.task_default_queue == "q"
    with pytest.raises(SettingsError, match="did you mean 'task_default_queue'"):
        FastQ("proj", task_default_que="q")


def test_settings_come_from_an_object_a_mapping_or_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf_a.py").write_text("task_default_queue = 'a'\nclass B:\n    task_default_queue = 'b'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert FastQ(config={"task_default_queue": "m"}).conf.task_default_queue == "m"
    assert FastQ(config="conf_a").conf.task_default_queue == "a"
    assert FastQ(config="conf_a:B").conf.task_default_queue == "b"
    assert FastQ(config="conf_a", task_default_queue="k").conf.task_default_queue == "k"
    app = FastQ()
    app.config_from_object({"CELERY_TASK_DEFAULT_QUEUE": "n"}, namespace="CELERY")
    assert app.conf.task_default_queue == "n"
    monkeypatch.setenv("MY_CONFIG", "conf_a")
    app.config_from_envvar("MY_CONFIG")
    assert app.conf.task_default_queue == "a"


def test_a_configuration_that_is_missing_is_named() -> None:
    with pytest.raises(SettingsError, match="'no_such_module_xyz' is not found"):
        FastQ(config="no_such_module_xyz")
    with pytest.raises(SettingsError, match="has no 'nothing'"):
        FastQ(config="json:nothing")
    with pytest.raises(SettingsError, match="'NOT_SET_XYZ' is not set"):
        FastQ().config_from_envvar("NOT_SET_XYZ")


def test_a_configuration_whose_own_import_fails_shows_that_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf_broken.py").write_text("import no_such_dependency_xyz\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency_xyz"):
        FastQ(config="conf_broken")


def test_the_first_message_freezes_the_settings() -> None:
    app = make_app()
    app.task(add).delay(1)
    with pytest.raises(SettingsError, match="cannot change any more"):
        app.conf.task_serializer = "yaml"


def test_override_changes_what_tasks_have_prepared_and_changes_it_back() -> None:
    app = make_app()
    task = app.task(add)
    task.delay(1)
    with app.override(task_default_queue="other", task_acks_late=False, task_always_eager=True):
        assert task.acks_late is False
        assert task.delay(2).get() == 2
    with app.override(task_default_queue="other"):
        task.delay(3)
    task.delay(4)
    assert task.acks_late is True
    assert [message.routing_key for message in sent(app).messages] == ["celery", "other", "celery"]


# --- the registry -----------------------------------------------------------------------------------------------------


def test_a_task_is_named_after_its_module_and_function() -> None:
    app = make_app()
    assert app.task(add).name == f"{__name__}.add"
    assert app.task(name="given")(add).name == "given"
    assert set(app.tasks) == {f"{__name__}.add", "given"}


SCRIPT = """
import sys
from fastq import FastQ
app = FastQ({name!r}, broker="memory://")
@app.task
def add(x):
    return x
print(add.name)
"""


@pytest.mark.parametrize(
    ("file", "name", "expected"),
    [
        ("script.py", "proj", "script.add"),
        ("script.py", None, "script.add"),
        ("pack/jobs.py", "proj", "pack.jobs.add"),
        ("plain/jobs.py", "plain.jobs", "plain.jobs.add"),
    ],
)
def test_a_program_names_its_tasks_as_a_worker_that_imports_it(
    tmp_path: Path, file: str, name: str | None, expected: str
) -> None:
    for folder in ("pack", "plain"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pack" / "__init__.py").touch()
    (tmp_path / file).write_text(SCRIPT.format(name=name))
    done = subprocess.run([sys.executable, file], cwd=tmp_path, env=python_path(), capture_output=True, check=True)
    assert done.stdout.decode().strip() == expected


def test_where_no_file_is_the_app_s_name_stands_for_the_module() -> None:
    code = SCRIPT.format(name="proj")
    done = subprocess.run([sys.executable, "-c", code], env=python_path(), capture_output=True, check=True)
    assert done.stdout.decode().strip() == "proj.add"


def test_main_run_as_a_module_keeps_its_package(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "jobs.py").write_text(SCRIPT.format(name=None))
    done = subprocess.run(
        [sys.executable, "-m", "pack.jobs"], cwd=tmp_path, env=python_path(), capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == "pack.jobs.add"


def python_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(fastq.app.__file__).parent.parent)}


def test_two_functions_of_one_name_are_refused_and_a_reload_is_not() -> None:
    app = make_app()

    def other() -> None: ...

    app.task(name="n")(add)
    app.task(name="n")(add)
    with pytest.raises(SettingsError, match=r"two tasks have the name 'n': .*add and .*other"):
        app.task(name="n")(other)


POOLS = """
import copy, multiprocessing, pickle
from fastq import FastQ, shared_task
app = FastQ("shop", broker="memory://", task_routes={"a.*": "a"})
@app.task
def add(x, y):
    return x + y
@shared_task
def mul(x, y):
    return x * y
if __name__ == "__main__":
    app.finalize()
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(pool.starmap(add, [(1, 2)]), pool.starmap(mul, [(2, 3)]), pool.apply(repr, (app,)))
"""


def test_tasks_and_applications_go_to_the_processes_of_a_pool(tmp_path: Path) -> None:
    (tmp_path / "pools.py").write_text(POOLS)
    done = subprocess.run(
        [sys.executable, "pools.py"], cwd=tmp_path, env=python_path(), capture_output=True, check=True
    )
    assert done.stdout.decode().splitlines() == ["[3] [6] <FastQ shop: 2 tasks>"] * 2


def test_a_pickle_or_copy_is_the_task_and_the_application_themselves() -> None:
    app = make_app()
    task = app.task(add)
    other = make_app()
    other.task(add)
    for again in (
        pickle.loads(pickle.dumps([task, app])),
        copy.deepcopy([task, app]),
        [copy.copy(task), copy.copy(app)],
    ):
        assert again[0] is task
        assert again[1] is app
    result = task.delay(1)
    for handle in (pickle.loads(pickle.dumps(result)), copy.copy(result)):
        assert (handle, handle.name) == (result, task.name)
        assert handle._source is app
    eager = pickle.loads(pickle.dumps(task.apply((1, 2))))
    assert (eager.get(), eager.state, eager.name) == (3, "SUCCESS", task.name)
    lost = app.task(name="lost")(add)
    del app.tasks["lost"]
    with pytest.raises(pickle.UnpicklingError, match=r"'lost'.*import"):
        copy.copy(lost)


def test_an_application_that_is_not_here_is_made_with_its_settings_and_not_the_current_one() -> None:
    app = make_app(task_default_queue="q", task_routes={"a": "b"})
    app.finalize()
    data = pickle.dumps([app.AsyncResult("a"), app.AsyncResult("b")])
    app._token, app.main = "gone", "other"
    first, second = pickle.loads(data)
    assert (first._source.conf.task_default_queue, first._source.main) == ("q", "proj")
    assert first._source is second._source
    assert first._source is not app
    assert current_app() is app


def test_what_is_no_function_cannot_be_a_task() -> None:
    app = make_app()
    with pytest.raises(TypeError, match="options are given by name"):
        app.task("name")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="options are given by name"):
        shared_task("name")  # type: ignore[call-overload]

    async def generator() -> AsyncIterator[int]:
        yield 1

    with pytest.raises(TypeError, match="generator function"):
        app.task(generator)


def test_a_class_cannot_be_a_task() -> None:
    class Plain:
        def __init__(self, x: int) -> None:
            pass

    class Declared(Task[..., Any]):
        pass

    app = make_app()
    for declare in (app.task, app.task(name="n"), shared_task):
        with pytest.raises(TypeError, match=r"'.*Plain' is a class; write a function that uses it"):
            declare(Plain)
        with pytest.raises(TypeError, match=r"'.*Declared' is a class; register it: app.register_task\(...\)"):
            declare(Declared)
    assert app.tasks == {}


@pytest.mark.parametrize(("option", "nearest"), [("retry_backof", "retry_backoff"), ("bnd", "bind"), ("basis", "base")])
def test_an_unknown_option_is_named_with_the_nearest_one(option: str, nearest: str) -> None:
    with pytest.raises(TypeError, match=f"unknown option '{option}'; did you mean '{nearest}'"):
        make_app().task(**{option: True})(add)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"priority": 256}, ValueError),
        ({"priority": "high"}, TypeError),
        ({"time_limit": -1}, ValueError),
        ({"soft_time_limit": "5"}, TypeError),
        ({"max_retries": -1}, ValueError),
        ({"max_retries": 1.5}, ValueError),
        ({"default_retry_delay": float("nan")}, ValueError),
        ({"autoretry_for": "ValueError"}, TypeError),
        ({"autoretry_for": (ValueError, 5)}, TypeError),
        ({"autoretry_for": 5}, TypeError),
        ({"autoretry_for": None}, TypeError),
        ({"throws": [int]}, TypeError),
        ({"throws": 5}, TypeError),
        ({"queue": ""}, ValueError),
        ({"queue": "q" * 256}, ValueError),
        ({"ignore_result": 1}, TypeError),
        ({"retry_kwargs": {"tries": 3}}, TypeError),
        ({"retry_kwargs": 5}, TypeError),
        ({"retry_kwargs": "max_retries"}, TypeError),
        ({"name": "n" * 256}, ValueError),
        ({"expires": "1h"}, TypeError),
        ({"expires": timedelta(hours=1)}, TypeError),
        ({"serializer": "jsn"}, SettingsError),
        ({"compression": "rar"}, EncodeError),
        ({"acks_late": "no"}, TypeError),
        ({"track_started": 1}, TypeError),
        ({"typing": "no"}, TypeError),
        ({"bind": "yes"}, TypeError),
        ({"bind": True}, TypeError),
        ({"base": dict}, TypeError),
        ({"retry_backoff": True}, TypeError),
        ({"retry_jitter": False}, TypeError),
        ({"retry_backoff": "yes", "autoretry_for": OSError}, TypeError),
        ({"retry_jitter": "no", "autoretry_for": OSError}, TypeError),
    ],
)
def test_a_wrong_option_fails_where_the_task_is_declared(options: dict[str, Any], error: type[Exception]) -> None:
    named = next(reversed(options)) if len(options) == 1 else next(iter(options))
    app = make_app()
    with pytest.raises(error, match=named):
        app.task(**options)(add)
    assert app.tasks == {}


def test_a_wrong_expires_is_answered_with_both_that_it_may_be() -> None:
    with pytest.raises(TypeError, match=r"expected a number of seconds or a datetime$"):
        make_app().task(expires=object())(add)  # type: ignore[call-overload]


def test_a_bound_function_has_a_place_for_the_task() -> None:
    app = make_app()
    for function in (lambda: None, lambda *, x: None, add):
        with pytest.raises(TypeError, match=r"has no place for it: write def f\(self, ...\)"):
            app.task(name="n", bind=True)(function)
    for function in (lambda self: None, lambda task, x: None, lambda *args: None):
        app.task(name="n", bind=True)(function)
        app.tasks.clear()


def test_a_generator_cannot_be_a_task() -> None:
    def numbers() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="generator function: calling it runs nothing"):
        make_app().task(numbers)


def test_what_celery_has_and_fastq_has_not_is_answered_with_what_there_is() -> None:
    app = make_app()
    task = app.task(add)
    lacking: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: app.task(rate_limit="10/m")(add), TypeError, "fastq control rate_limit"),  # type: ignore[call-overload]
        (lambda: app.task(retry_on_worker_lost=True)(add), TypeError, "reliable mode"),  # type: ignore[call-overload]
        (lambda: app.task(on_failure=print)(add), TypeError, "base class"),  # type: ignore[call-overload]
        (lambda: task.apply_async((1,), link=task), TypeError, "send the next one"),  # type: ignore[call-arg]
        (lambda: task.s(1), AttributeError, "'s', which Celery has and fastq has not"),  # type: ignore[attr-defined]
        (lambda: app.control, AttributeError, "fastq control"),  # type: ignore[attr-defined]
        (lambda: fastq.chain, AttributeError, "send the next one"),
        (lambda: FastQ(beat_schedule={}), SettingsError, "no scheduler; let cron"),
        (lambda: FastQ(task_annotations={}), SettingsError, "base class"),
        (lambda: FastQ(database_url="x"), SettingsError, "sqlite://"),
    ]
    for use, error, words in lacking:
        with pytest.raises(error, match=re.escape(words)) as raised:
            use()
        assert "did you mean" not in str(raised.value)
    with pytest.raises(SettingsError, match="did you mean 'worker_pool_restarts'"):
        FastQ(worker_pool_restart=True)
    assert not hasattr(task, "si")
    assert "si" not in dir(task)
    with pytest.raises(AttributeError, match="type object 'Task' has no 'si', which Celery has"):
        Task.si  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        task.nothing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", ["chain", "group", "chord", "chunks", "signature", "Celery", "signals", "crontab"])
def test_what_celery_has_and_fastq_has_not_says_so_to_who_imports_it(name: str) -> None:
    with pytest.raises(AttributeError) as raised:
        getattr(fastq, name)
    assert f"module 'fastq' has no '{name}', which Celery has and fastq has not (yet): " in str(raised.value)
    with pytest.raises(ImportError, match=f"^{re.escape(str(raised.value))}$"):
        exec(f"from fastq import {name}")
    assert not hasattr(fastq, name)
    with pytest.raises(ImportError, match=r"^cannot import name 'nothing'"):
        exec("from fastq import nothing")


def test_the_current_task_is_the_one_that_runs_here() -> None:
    app = make_app()
    seen: list[object] = []

    @app.task(bind=True)
    def look(self: Task[..., Any]) -> None:
        seen.extend([current_task == self, bool(current_task), current_task.request.id, current_task.name])

    assert not current_task
    assert not hasattr(current_task, "request")
    result = look.apply()
    assert seen == [True, True, result.id, look.name]
    assert get_task_logger("shop").name == "fastq.task.shop"


class Greeter(Task[[str], str]):
    name = "greet"
    greeting = "Hello"

    def run(self, who: str) -> str:
        return f"{self.greeting} {who}"


def test_a_task_class_is_registered_as_class_or_instance() -> None:
    app = make_app()
    by_class = app.register_task(Greeter)
    assert app.tasks["greet"] is by_class
    assert by_class("you") == "Hello you"
    by_instance = app.register_task(Greeter())
    by_instance.delay("me")
    assert body(sent(app).messages[0])[0] == ["me"]
    with pytest.raises(TypeError, match="no run"):
        app.register_task(Task())


def test_a_base_class_gives_defaults_and_handlers_and_the_decorator_wins() -> None:
    class Base(Task[..., Any]):
        max_retries = 9
        queue = "base"
        throws = (KeyError,)

        def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None: ...

    task = make_app().task(base=Base, queue="mine")(add)
    assert isinstance(task, Base)
    assert (task.max_retries, task.queue, task.throws) == (9, "mine", (KeyError,))
    assert task.handlers == {"on_success"}


def test_a_task_takes_from_the_settings_what_it_does_not_say() -> None:
    app = make_app(task_ignore_result=True, task_track_started=True)
    silent, loud = app.task(add), app.task(name="loud", ignore_result=False)(add)
    app.finalize()
    assert (silent.ignore_result, silent.acks_late, silent.track_started) == (True, True, True)
    assert loud.ignore_result is False
    late = app.task(name="late")(add)
    assert late.ignore_result is True


def test_exceptions_of_a_task_are_those_it_throws_and_retries_for() -> None:
    app = make_app()
    app.task(name="n", throws=KeyError, autoretry_for=(OSError,))(add)
    assert app.exceptions_of("n") == (KeyError, OSError)
    assert app.exceptions_of("unknown") == app.exceptions_of(None) == ()


# --- shared tasks -----------------------------------------------------------------------------------------------------


def test_a_shared_task_belongs_to_apps_made_before_and_after_it() -> None:
    before = make_app()
    shared = shared_task(name="shared", max_retries=7)(add)
    after = make_app()
    assert before.tasks["shared"] is not after.tasks["shared"]
    assert before.tasks["shared"].max_retries == after.tasks["shared"].max_retries == 7
    assert current_app() is after
    assert shared(1, 2) == 3
    assert shared.name == "shared"
    shared.delay(1)
    assert len(sent(after).messages) == 1
    assert sent(before).messages == []


def test_a_shared_task_works_before_any_app_exists() -> None:
    shared = shared_task(add)
    assert repr(shared) == f"<shared task {__name__}.add>"
    assert shared(2, 3) == 5
    app = make_app()
    fastq.app.set_current_app(app)
    assert shared.name == f"{__name__}.add"
    assert shared.app is app


def test_a_wrong_option_of_a_shared_task_is_named_where_it_is_declared() -> None:
    with pytest.raises(TypeError, match="expires is '1h'"):
        shared_task(expires="1h")(add)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fastq control rate_limit"):
        shared_task(rate_limit="1/s")(add)  # type: ignore[call-overload]
    assert fastq.app._joining == []


def test_a_shared_task_may_be_bound() -> None:
    @shared_task(bind=True)
    def who(self: Task[..., Any]) -> str:
        return self.name

    make_app()
    assert who() == f"{__name__}.who"


# --- loading modules --------------------------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, content in (("pa", "LOADED = True\n"), ("pb", None), ("pc", "import no_such_dependency_xyz\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        if content is not None:
            (tmp_path / name / "tasks.py").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in [name for name in sys.modules if name.partition(".")[0] in {"pa", "pb", "pc"}]:
        del sys.modules[module]


def test_tasks_are_discovered_when_they_are_loaded(packages: Path) -> None:
    app = make_app()
    app.autodiscover_tasks(["pa", "pb"])
    app.autodiscover_tasks(lambda: ["pa"], related_name=None)
    assert "pa.tasks" not in sys.modules
    app.load_tasks()
    assert sys.modules["pa.tasks"].LOADED


def test_a_task_module_that_fails_to_import_is_an_error(packages: Path) -> None:
    app = make_app()
    app.autodiscover_tasks(["pc"])
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency_xyz"):
        app.load_tasks()
    with pytest.raises(SettingsError, match="'include' names 'no_such_package_xyz', which is not found"):
        make_app(include=["no_such_package_xyz"]).load_tasks()


# --- routing ----------------------------------------------------------------------------------------------------------


def by_prefix(name: str, args: Any, kwargs: Any, options: Any, task: Any = None) -> Any:
    return {"queue": "functions"} if name.startswith("f.") else None


@pytest.mark.parametrize(
    ("routes", "name", "queue"),
    [
        ({"a.b": "exact"}, "a.b", "exact"),
        ({"a.*": {"queue": "glob"}, "a.b": {"queue": "exact"}}, "a.b", "exact"),
        ({"a.*": {"queue": "glob"}}, "a.b", "glob"),
        ({"a.?": "mark", "a.*": "star"}, "a.b", "mark"),
        ({"a.*": "glob"}, "b.a", None),
        ([("a.*", "first"), ("a.*", "second")], "a.b", "first"),
        ([{"x": "1"}, {"a.b": "2"}], "a.b", "2"),
        ([by_prefix, {"*": "rest"}], "f.x", "functions"),
        ([by_prefix, {"*": "rest"}], "g.x", "rest"),
        (by_prefix, "f.x", "functions"),
        ("tests.api.test_app.by_prefix", "f.x", "functions"),
        ("tests.api.test_app:by_prefix", "f.x", "functions"),
        (None, "a", None),
    ],
)
def test_a_route_is_found_by_name_glob_function_or_path(routes: Any, name: str, queue: str | None) -> None:
    assert Router(routes).route(name) == (NO_ROUTE if queue is None else Route(queue=queue))


@pytest.mark.parametrize(
    ("routes", "words"),
    [
        (5, "expected a dict"),
        ({5: "q"}, "the key 5"),
        ({"a": 5}, r"task_routes\['a'\] is 5"),
        ({"a": {"queu": "q"}}, "unknown field 'queu'"),
        ("no_such_module_xyz.f", "cannot be imported"),
        ("tests.api.test_app.nothing", "cannot be imported"),
        ("nodots", "cannot be imported"),
    ],
)
def test_a_wrong_route_is_named_when_the_app_is_finalized(routes: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        make_app(task_routes=routes).finalize()


def test_options_win_over_the_task_over_its_route_over_the_settings() -> None:
    app = make_app(task_routes={"routed": {"queue": "route", "priority": 3}}, task_default_queue="default")
    plain, routed = app.task(name="plain")(add), app.task(name="routed")(add)
    own = app.task(name="own", queue="own", priority=9)(add)
    plain.delay(1)
    routed.delay(1)
    own.delay(1)
    own.apply_async((1,), queue="call", priority=1)
    app.send_task("routed", (1,))
    keys = [(message.routing_key, message.priority) for message in sent(app).messages]
    assert keys == [("default", 0), ("route", 3), ("own", 9), ("call", 1), ("route", 3)]
    assert sent(app).declared == ["default", "route", "own", "call"]


def test_a_router_function_sees_the_arguments_of_every_call() -> None:
    def by_size(name: str, args: Any, kwargs: Any, options: Any, task: Any = None) -> Any:
        assert task is not None
        return "large" if args[0] > 10 or kwargs.get("y") else None

    app = make_app(task_routes=by_size)
    task = app.task(add)
    task.delay(1)
    task.delay(11)
    task.delay(1, y=1)
    assert [message.routing_key for message in sent(app).messages] == ["celery", "large", "large"]


def test_an_exchange_and_a_routing_key_are_taken_as_they_are() -> None:
    app = make_app()
    task = app.task(add)
    task.apply_async((1,), exchange="topics", routing_key="a.b")
    task.apply_async((1,), exchange="topics", routing_key="a.b", queue="q")
    assert [(message.exchange, message.routing_key) for message in sent(app).messages] == [("topics", "a.b"), ("", "q")]
    assert sent(app).declared == ["q"]


def test_queues_that_are_not_declared_are_refused_when_none_may_be_created() -> None:
    app = make_app(task_create_missing_queues=False, task_queues=["known"])
    task = app.task(add)
    task.delay(1)
    task.apply_async((1,), queue="known")
    for options in ({"queue": "other"}, {"routing_key": "other"}):
        with pytest.raises(SettingsError, match="unknown queue 'other'; declared: celery, known"):
            task.apply_async((1,), **options)  # type: ignore[misc]
    assert sent(app).declared == ["celery"]


# --- publishing -------------------------------------------------------------------------------------------------------


def test_a_task_is_sent_by_name_with_every_option() -> None:
    app = make_app()
    result = app.send_task("elsewhere.job", [1], {"k": 2}, task_id="given", headers={"x": "y"}, shadow="s")
    message = sent(app).messages[0]
    assert result.id == message.id == "given"
    assert body(message) == [[1], {"k": 2}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    found = headers(message)
    assert (found["task"], found["id"], found["x"], found["shadow"]) == ("elsewhere.job", "given", "y", "s")
    with pytest.raises(TypeError, match="did you mean 'countdown'"):
        app.send_task("job", countdow=1)  # type: ignore[call-arg]


def test_send_task_does_not_remember_endless_names() -> None:
    app = make_app()
    for number in range(1100):
        app.send_task(f"job{number}")
    assert len(app.sender._named) <= 1024


def test_a_batch_is_published_with_one_wait() -> None:
    app = make_app()
    task = app.task(add)
    with app.batch():
        results = [task.delay(number) for number in range(5)]
        with app.batch():
            task.delay(5)
        assert sent(app).batches == []
    assert [len(batch) for batch in sent(app).batches] == [6]
    assert [message.id for message in sent(app).messages[:5]] == [result.id for result in results]
    with app.batch():
        pass
    assert len(sent(app).batches) == 1


def test_after_an_exception_a_batch_is_not_published() -> None:
    app = make_app()
    task = app.task(add)
    with pytest.raises(ZeroDivisionError), app.batch():
        task.delay(task.delay(1) and 1 // 0)
    assert sent(app).batches == []
    task.delay(2)
    assert len(sent(app).batches) == 1


def test_waiting_for_what_an_exception_has_kept_from_being_sent_raises_at_once() -> None:
    app = make_app()
    task = app.task(add)
    results = []
    with contextlib.suppress(ZeroDivisionError), app.batch():
        results.append(task.delay(1))
        with app.batch():
            results.append(app.send_task("elsewhere"))
        raise ZeroDivisionError("by hand")
    assert sent(app).batches == []
    results.append(pickle.loads(pickle.dumps(results[0])))
    for result in results:
        never = pytest.raises(
            RuntimeError, match=rf"{result.id} was never sent: .* ended with ZeroDivisionError: by hand"
        )
        for wait in (result.get, result.ready, result.successful, result.failed, lambda each=result: each.state):
            with never:
                wait()
        with never:
            asyncio.run(result.aget())
        result.forget()
    # What failed inside an outer batch that went on is sent with it.
    with app.batch():
        with contextlib.suppress(ZeroDivisionError), app.batch():
            result = task.delay(2)
            raise ZeroDivisionError
        with pytest.raises(RuntimeError, match="Call get"):
            result.get()
    assert [message.id for message in sent(app).messages] == [result.id]
    assert not result.ready()


def test_a_task_has_no_children_that_were_never_sent() -> None:
    app = make_app()
    task = app.task(add)
    request = Request.local("parent", (), {}, id="id-1")
    push_request(request)
    try:
        before = task.delay(1)
        with contextlib.suppress(ZeroDivisionError), app.batch():
            task.delay(2)
            raise ZeroDivisionError
    finally:
        pop_request()
    assert request.children == [before]


def test_waiting_inside_a_batch_for_what_is_not_sent_yet_raises_at_once() -> None:
    app = make_app()
    task = app.task(add)
    before = task.delay(0)
    app.store.save(before.id, "SUCCESS", encode_meta(before.id, "SUCCESS", 7))
    with app.batch():
        result = task.delay(1)
        with pytest.raises(RuntimeError, match=r"inside `with app.batch\(\)` would wait for ever"):
            result.get()
        with pytest.raises(RuntimeError, match=r"Call get\(\) after the block"):
            asyncio.run(result.aget())
        assert before.get(timeout=1) == 7
    with pytest.raises(ResultTimeout):
        result.get(timeout=0)


def test_a_batch_belongs_to_its_thread() -> None:
    app = make_app()
    task = app.task(add)
    with app.batch():
        task.delay(1)
        other = threading.Thread(target=task.delay, args=(2,))
        other.start()
        other.join()
        assert [body(message)[0] for message in sent(app).messages] == [[2]]
    assert [body(message)[0] for message in sent(app).messages] == [[2], [1]]


QUICK = {"max_retries": 3, "interval_start": 0, "interval_step": 0, "interval_max": 0}


@pytest.mark.parametrize("error", [ConnectionLost("gone"), PublishError("not confirmed")])
def test_publishing_is_tried_again(error: Exception) -> None:
    app = make_app(task_publish_retry_policy=QUICK)
    sent(app).failures = [error] * 3
    app.task(add).delay(1)
    assert len(sent(app).messages) == 1


def test_after_the_last_attempt_the_error_is_raised() -> None:
    app = make_app(task_publish_retry_policy=QUICK)
    task = app.task(add)
    sent(app).failures = [ConnectionLost(str(number)) for number in range(5)]
    with pytest.raises(ConnectionLost, match="3"):
        task.delay(1)
    assert len(sent(app).failures) == 1


def test_a_call_may_say_how_publishing_is_retried() -> None:
    app = make_app(task_publish_retry_policy=QUICK)
    task = app.task(add)
    sent(app).failures = [ConnectionLost("gone")]
    with pytest.raises(ConnectionLost):
        task.apply_async((1,), retry=False)
    sent(app).failures = [ConnectionLost("gone")] * 2
    with pytest.raises(ConnectionLost):
        task.apply_async((1,), retry_policy={"max_retries": 1})
    with app.override(task_publish_retry=False):
        sent(app).failures = [ConnectionLost("gone")]
        with pytest.raises(ConnectionLost):
            task.delay(1)
        sent(app).failures = [ConnectionLost("gone")]
        task.apply_async((1,), retry=True)
    with pytest.raises(SettingsError, match="unknown key 'tries'"):
        task.apply_async((1,), retry_policy={"tries": 1})


def test_other_errors_are_not_tried_again() -> None:
    app = make_app(task_publish_retry_policy=QUICK)
    task = app.task(add)
    sent(app).failures = [SettingsError("wrong password")]
    with pytest.raises(SettingsError):
        task.delay(1)
    assert sent(app).messages == []


def test_the_pause_between_attempts_grows_to_its_bound() -> None:
    retry = PublishRetry(interval_start=0.1, interval_step=0.2, interval_max=0.4)
    assert [round(retry.pause_s(attempt), 3) for attempt in range(4)] == [0.1, 0.3, 0.4, 0.4]


# --- results and connections ------------------------------------------------------------------------------------------


def test_messages_carry_the_reply_address_of_the_store() -> None:
    from fastq.wire.properties import decode_properties

    app = make_app()
    app.store = RecordingStore(address="reply-queue")
    app.task(add).delay(1)
    app.task(name="silent", ignore_result=True)(add).delay(1)
    app.send_task("by-name")
    found = [decode_properties(message.props).get("reply_to") for message in sent(app).messages]
    assert found == ["reply-queue", None, "reply-queue"]


@pytest.mark.parametrize(
    ("broker", "store"),
    [
        ("amqp://nowhere", "rpc://"),
        ("redis://nowhere:1/2", "redis://nowhere:1/2"),
        ("tests.toys.toy_broker:BROKER://here", "sqlite:///results.db"),
    ],
)
def test_without_a_result_backend_asking_for_a_result_names_the_store_that_fits(broker: str, store: str) -> None:
    app = FastQ("proj", broker=broker, backend="disabled")
    app.publisher = RecordingPublisher()
    result = app.task(add).delay(1)
    assert app.stores_results is False
    with pytest.raises(ResultsDisabled, match=re.escape(f"name a store: FastQ(backend={store!r})")):
        result.get(timeout=1)


def test_eager_opens_neither_broker_nor_store(tmp_path: Path) -> None:
    app = FastQ("proj", broker=f"sqlite:///{tmp_path}/fastq.db", backend=f"sqlite:///{tmp_path}/results.db")
    task = app.task(name="add")(add)

    @app.task(bind=True)
    def outer(self: Task[..., Any]) -> int:
        self.update_state(state="HALF", task_id="another")
        return task.delay(1, 2).get() + app.send_task("add", (3, 4)).get()

    with app.override(task_always_eager=True):
        assert outer.delay().get() == outer.apply_async().get() == 10
        with pytest.raises(NotRegistered, match="'elsewhere' cannot run here and now"):
            app.send_task("elsewhere")
    assert (app.sender._publisher, app.sender._store, [*tmp_path.iterdir()]) == (None, None, [])


def test_an_override_of_urls_sets_open_connections_aside(tmp_path: Path) -> None:
    app = FastQ("proj", broker=f"sqlite:///{tmp_path}/fastq.db")
    task = app.task(add)
    task.delay(1)
    real, store = app.publisher, app.store
    with app.override(broker_url="memory://aside"):
        task.delay(2)
        task.delay(3)
        inside = app.publisher
        assert (inside.depth("celery"), real.depth("celery")) == (2, 1)
        assert app.conf.result_backend == "memory://aside"
        assert app.store is not store
    assert (app.publisher, app.store) == (real, store)
    task.delay(4)
    assert real.depth("celery") == 2
    with app.override(task_default_queue="other"):
        assert app.publisher is real
    app.close()


def test_close_closes_what_was_opened() -> None:
    app = make_app()
    publisher, store = sent(app), app.store
    app.close()
    assert publisher.closed
    assert isinstance(store, RecordingStore)
    assert store.closed
    app.close()


def test_a_forked_child_sends_under_its_own_process_id() -> None:
    app = make_app()
    task = app.task(add)
    task.delay(1)
    assert headers(sent(app).messages[0])["origin"].startswith(f"gen{os.getpid()}@")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            task.delay(2)
            os.write(write, headers(sent(app).messages[1])["origin"].encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read().startswith(f"gen{pid}@")
    os.waitpid(pid, 0)
    task.delay(3)
    assert headers(sent(app).messages[1])["origin"].startswith(f"gen{os.getpid()}@")


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"asyncio", "orjson", "fastq.app", "fastq.wire.message"}
    script = f"import sys, fastq; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], env=python_path(), capture_output=True, check=True)
    assert done.stdout.decode().strip() == "[]"


def test_all_is_sorted_and_every_name_is_there() -> None:
    assert fastq.__all__ == sorted(fastq.__all__)
    for name in fastq.__all__:
        assert getattr(fastq, name) is not None
    assert set(dir(fastq)) == set(fastq.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastq.nothing  # noqa: B018


def test_a_serializer_that_the_own_workers_refuse_is_refused_when_sending() -> None:
    app = make_app()
    refused = r"serializer 'pickle'.*would refuse.*accept_content is \['json'\].*Add 'pickle'"
    with pytest.raises(SettingsError, match=refused):
        app.send_task("elsewhere", (1,), serializer="pickle")
    app = make_app(task_serializer="pickle")
    with pytest.raises(SettingsError, match="would refuse"):
        app.send_task("elsewhere", (1,))
    app = make_app(accept_content=["application/x-python-serialize"])
    app.send_task("elsewhere", (1,), serializer="pickle")
