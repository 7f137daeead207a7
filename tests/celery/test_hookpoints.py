"""Which tasks must run through Celery's own tracer, with the tools that people use.

What a tool replaces stays replaced in its process, so each one has a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest

FASTQ_FIRST = "import fastq.celery.checking.hookpoints"

PROGRAM = """
import json
from celery import Celery
{before}
app = Celery("proj", broker="memory://", backend={backend!r})
options = {{}}
{setup}
@app.task(name="add", **options)
def add(x, y):
    return x + y
app.finalize()
{after}
from fastq.celery.checking.hookpoints import touched
print(json.dumps(touched(app.tasks["add"], app)))
"""


def reasons(before: str = "", setup: str = "", after: str = "", backend: str = "redis://localhost/1") -> list[str]:
    """Return what is said of a task after these statements."""
    parts = {name: textwrap.dedent(text) for name, text in (("before", before), ("setup", setup), ("after", after))}
    program = PROGRAM.format(backend=backend, **parts)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, list)
    return found


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.mark.parametrize("backend", ["redis://localhost/1", "rpc://", "disabled://"])
def test_nothing_is_said_of_a_plain_application(backend: str) -> None:
    assert reasons(backend=backend, setup="options = {'autoretry_for': (OSError,)}") == []


def test_what_celerys_worker_itself_patches_does_not_count() -> None:
    assert (
        reasons(after="from celery.app.trace import setup_worker_optimizations; setup_worker_optimizations(app)") == []
    )


# --- the tools

SENTRY = """
import sentry_sdk
from sentry_sdk.integrations.celery import CeleryIntegration
sentry_sdk.init(dsn="http://key@localhost:1/1", integrations=[CeleryIntegration()], default_integrations=False)
"""


@needs("sentry_sdk")
@pytest.mark.parametrize("order", ["", FASTQ_FIRST], ids=["sentry-first", "fastq-first"])
def test_sentry_puts_its_own_tracer_in(order: str) -> None:
    found = reasons(before=order + SENTRY)
    assert "celery.app.trace.build_tracer is replaced by sentry_sdk.integrations.celery" in found
    # Children send through Celery's functions in any case, and end within billiard's when these are replaced.
    assert not any("Producer.publish" in reason or "workloop" in reason for reason in found)


@needs("opentelemetry.instrumentation.celery")
def test_opentelemetry_listens_to_signals_alone() -> None:
    instrument = """
    from opentelemetry.instrumentation.celery import CeleryInstrumentor
    CeleryInstrumentor().instrument()
    from celery import signals
    assert signals.task_prerun.receivers
    """
    assert reasons(before=instrument) == []


@needs("elasticapm")
def test_elastic_apm_listens_to_signals_alone() -> None:
    register = """
    import elasticapm
    from elasticapm.contrib.celery import register_exception_tracking, register_instrumentation
    client = elasticapm.Client(service_name="x", disable_send=True, metrics_interval="0ms", central_config=False)
    register_instrumentation(client)
    register_exception_tracking(client)
    from celery import signals
    assert signals.task_prerun.receivers
    """
    assert reasons(before=register) == []


@needs("celery_once")
def test_celery_once_overrides_methods_that_are_called() -> None:
    setup = """
    from celery_once import QueueOnce
    options = {"base": QueueOnce}
    app.conf.ONCE = {"backend": "celery_once.backends.Redis", "settings": {"url": "redis://localhost/1"}}
    """
    assert reasons(setup=setup) == []


@needs("celery_singleton")
def test_celery_singleton_overrides_methods_that_are_called() -> None:
    assert reasons(setup="from celery_singleton import Singleton; options = {'base': Singleton}") == []


@needs("celery_batches")
def test_celery_batches_has_a_strategy_of_its_own() -> None:
    found = reasons(setup="from celery_batches import Batches; options = {'base': Batches}")
    assert found == ["the task has its own Strategy, celery_batches.Batches.Strategy"]


@needs("newrelic")
def test_new_relics_wrappers_are_seen_through() -> None:
    found = reasons(before="import newrelic.agent; newrelic.agent.initialize()")
    assert any(reason.startswith("celery.app.trace.build_tracer is replaced by newrelic") for reason in found)


@needs("django", "django_celery_results")
def test_results_in_djangos_database_are_written_by_celerys_own_code() -> None:
    before = """
    import django
    from django.conf import settings
    settings.configure(
        INSTALLED_APPS=["django_celery_results"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        DEFAULT_AUTO_FIELD="django.db.models.AutoField",
        USE_TZ=True,
    )
    django.setup()
    """
    found = reasons(before=before, backend="django-db")
    assert found == [
        "its results go to django_celery_results.backends.database.DatabaseBackend, which only Celery's own code writes"
    ]
    assert reasons(before=before, backend="django-db", setup="options = {'ignore_result': True}") == []


# --- by hand, one hook point after the other


@pytest.mark.parametrize("order", ["", FASTQ_FIRST], ids=["patched-first", "fastq-first"])
@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("celery.app.trace", "build_tracer"),
        ("celery.app.trace", "trace_task"),
        ("celery.app.task.Task", "__call__"),
    ],
)
def test_a_replacement_is_seen_even_when_it_bears_the_name_of_what_it_replaces(
    place: str, name: str, order: str
) -> None:
    patch = f"""
    import functools, importlib, sys
    import billiard.pool, celery.app.task, celery.app.base, celery.app.trace, kombu.messaging
    from celery.utils.imports import symbol_by_name
    try:
        place = importlib.import_module({place!r})
    except ImportError:
        place = symbol_by_name({place!r})
    original = getattr(place, {name!r})
    @functools.wraps(original)
    def replacement(*args, **kwargs):
        return original(*args, **kwargs)
    setattr(place, {name!r}, replacement)
    """
    before = f"{order}\n{textwrap.dedent(patch)}"
    assert reasons(before=before) == [f"{place}.{name} is replaced by __main__"]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("celery.app.task.Task", "apply_async"),
        ("celery.app.base.Celery", "send_task"),
        ("kombu.messaging.Producer", "publish"),
        ("billiard.pool.Worker", "workloop"),
        ("billiard.pool.Worker", "_do_exit"),
    ],
)
def test_what_children_call_in_any_case_does_not_count(place: str, name: str) -> None:
    patch = f"""
    import billiard.pool, celery.app.task, celery.app.base, kombu.messaging
    from celery.utils.imports import symbol_by_name
    place = symbol_by_name({place!r})
    original = getattr(place, {name!r})
    setattr(place, {name!r}, lambda *args, **kwargs: original(*args, **kwargs))
    """
    assert reasons(before=patch) == []


def test_a_replacement_in_billiards_worker_is_told_from_the_genuine_one() -> None:
    program = """
    import functools
    from billiard.pool import Worker
    from fastq.celery.checking.hookpoints import is_genuine
    assert is_genuine(Worker.workloop) and is_genuine(Worker._do_exit)
    original = Worker._do_exit
    @functools.wraps(original)
    def wrapped(*args):
        return original(*args)
    assert wrapped.__module__ == "billiard.pool"
    assert not is_genuine(wrapped)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)


def test_a_call_of_the_tasks_own_class_does_not_count() -> None:
    setup = """
    class Mine(app.Task):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)
        def apply_async(self, *args, **kwargs):
            return super().apply_async(*args, **kwargs)
        def on_success(self, *args):
            pass
        def after_return(self, *args):
            pass
    options = {"base": Mine}
    """
    assert reasons(setup=setup) == []


def test_an_application_wide_task_class_of_the_users_does_not_count() -> None:
    setup = """
    class ContextTask(app.Task):
        def __call__(self, *args, **kwargs):
            return self.run(*args, **kwargs)
    app.Task = ContextTask
    """
    assert reasons(setup=setup) == []


def test_run_replaced_on_the_task_counts() -> None:
    found = reasons(after="task = app.tasks['add']; task.run = lambda x, y: 0")
    assert found == ["run of the task is replaced by __main__"]


def test_a_tracer_made_by_others_counts_and_celerys_own_does_not() -> None:
    own = """
    from celery.app.trace import build_tracer
    app.tasks["add"].__trace__ = build_tracer("add", app.tasks["add"], app=app)
    """
    assert reasons(after=own) == []
    found = reasons(after="app.tasks['add'].__trace__ = lambda *args: None")
    assert found == ["the task's tracer is replaced by __main__"]


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("Request", "celery.worker.request.Request"), ("Strategy", "celery.worker.strategy.default")],
)
def test_a_request_or_strategy_of_the_tasks_own_counts(attribute: str, value: str) -> None:
    derived = f"from celery.utils.imports import symbol_by_name; original = symbol_by_name({value!r})\n"
    if attribute == "Request":
        derived += "class Own(original): pass\n"
    else:
        derived += "def Own(*args, **kwargs): return original(*args, **kwargs)\n"
    found = reasons(
        before=derived,
        setup=f"options = {{'{attribute}': staticmethod(Own)}}"
        if attribute == "Strategy"
        else "options = {'Request': Own}",
    )
    assert found == [f"the task has its own {attribute}, __main__.Own"]
    same = reasons(
        before=derived,
        setup=f"options = {{'{attribute}': {value.rpartition('.')[0]!r} + ':' + {value.rpartition('.')[2]!r}}}",
    )
    assert same == []


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        ("app.conf.result_serializer = 'yaml'", "results are serialized by 'yaml'"),
        ("app.conf.result_compression = 'gzip'", "results are compressed by 'gzip'"),
    ],
)
def test_results_in_another_form_than_plain_json_count_unless_there_are_none(setup: str, expected: str) -> None:
    assert reasons(setup=setup) == [expected]
    assert reasons(setup=f"{setup}; options = {{'ignore_result': True}}") == []
    assert reasons(setup=setup, backend="disabled://") == []


def test_persistent_replies_count() -> None:
    found = reasons(backend="rpc://", setup="app.conf.result_persistent = True")
    assert found == ["results are sent as persistent messages"]


def test_keys_of_another_form_count_and_a_global_prefix_does_not() -> None:
    prefixed = "app.conf.result_backend_transport_options = {'global_keyprefix': 'mine'}"
    assert reasons(setup=prefixed) == []
    found = reasons(after="app.backend.task_keyprefix = b'other-'")
    assert found == ["the keys of results start with 'other-'"]


@pytest.mark.since("5.7", "a class cannot be a result_backend")
def test_a_result_store_of_ones_own_counts() -> None:
    setup = """
    from celery.backends.redis import RedisBackend
    class Mine(RedisBackend):
        pass
    app.backend_cls = Mine
    """
    assert reasons(setup=setup) == ["its results go to __main__.Mine, which only Celery's own code writes"]


@pytest.mark.parametrize(
    "patch",
    [
        "from celery.backends.base import Backend as B; B.store_result = lambda *args, **kwargs: None",
        "from celery.backends.redis import RedisBackend as B; B.set = lambda *args, **kwargs: None",
        "app.backend.store_result = lambda *args, **kwargs: None",
    ],
)
def test_patched_methods_of_the_result_store_count(patch: str) -> None:
    (found,) = reasons(after=patch)
    assert found.endswith("is replaced by __main__")
    assert "set" in found or "store_result" in found


def test_a_json_serializer_of_others_counts() -> None:
    before = """
    import json
    from kombu.serialization import register
    register("json", json.dumps, json.loads, "application/json", "utf-8")
    """
    assert "the serializer 'json' is not kombu's own" in reasons(before=before)


def test_a_function_of_fastq_counts_as_what_it_stands_in_for() -> None:
    ours = """
    import functools, fastq
    from celery.app.task import Task as T
    code = compile("def __call__(self, *a, **k): return original(self, *a, **k)", fastq.__file__, "exec")
    space = {"original": T.__call__, "__name__": "fastq.celery.sending.accelerate"}
    exec(code, space)
    T.__call__ = functools.wraps(T.__call__)(space["__call__"])
    """
    theirs = """
    from celery.app.task import Task as Before
    def theirs(self, *args, original=Before.__call__, **kwargs):
        return original(self, *args, **kwargs)
    Before.__call__ = theirs
    """
    assert reasons(before=ours) == []
    found = reasons(before=textwrap.dedent(theirs) + textwrap.dedent(ours))
    assert found == ["celery.app.task.Task.__call__ is replaced by __main__"]
