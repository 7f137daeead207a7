"""Settings in forms that Celery starts with although nobody has written them down: its worker and ours, side by side.

Nothing is connected to: what is made of a configuration before is made by each worker's own code.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import celery
import pytest
from celery import _state

from fastq.brokers.rabbitmq.bus import event_steps
from fastq.brokers.rabbitmq.url import Endpoints
from fastq.brokers.redis.layout import read_layout
from fastq.brokers.redis.url import parse_redis_url
from fastq.celery.conf.carried import CARRIED, How
from fastq.celery.conf.options import as_celery_means
from fastq.celery.conf.settings import _types
from fastq.celery.worker.program import CeleryProgram
from fastq.errors import ConnectionLost, SettingsError
from fastq.queues import Topology
from fastq.results.redis.layout import ResultLayout
from fastq.settings import Settings
from fastq.worker.options import WorkerOptions

# Celery warns of running as root, and of settings that its store does not know.
pytestmark = pytest.mark.filterwarnings("ignore")

BROKER = "redis://localhost"


def application(**conf: Any) -> celery.Celery:
    app = celery.Celery("odd", broker=conf.pop("broker", BROKER), set_as_current=False)
    app.conf.update(conf)
    app.task(name="odd.task")(nothing)
    return app


def nothing() -> None:
    """Do nothing, as a task."""


def settle(app: celery.Celery) -> tuple[Settings, WorkerOptions]:
    """Do what a worker of ours does before it connects, and return what it goes by."""
    program = CeleryProgram(app)
    settings = program.settings
    settings.freeze()
    options = as_celery_means(WorkerOptions(), "celery").resolved(settings)
    program.task_rules(options)
    for queue in options.queues:
        list(Topology(settings).spec(queue).steps())
    list(event_steps(settings, "queue"))
    url = str(settings.broker_url)
    if url.startswith("amqp"):
        Endpoints(url, settings)
    else:
        parse_redis_url(url, settings)
        read_layout(settings, 0)
    if program.results != "disabled":
        parse_redis_url(program.results, settings, "results")
        ResultLayout(settings)
    return settings, options


def start_celery(app: celery.Celery) -> Any:
    """Do what Celery's worker does before it connects. Raises what it fails with."""
    app.finalize()
    try:
        worker = app.Worker(pool="threads")
    finally:
        _state._set_task_join_will_block(False)  # this process is no child of a worker
    app.connection_for_read()
    list(app.amqp.queues.values())
    _ = app.backend
    return worker


STARTS: list[dict[str, Any]] = [
    {"broker_use_ssl": {"ssl_validate_ocsp": False}},
    {"broker_use_ssl": {"ssl_validate_ocsp": False}, "broker": "amqp://localhost"},
    {"redis_backend_use_ssl": {"ssl_cert_reqs": "none", "ssl_validate_ocsp": False}, "result_backend": "rediss://h"},
    {"result_backend": "redis://localhost/0?lib_name=proj&socket_read_size=65536"},
    {"event_queue_ttl": None, "event_queue_expires": None},
    {"task_time_limit": "300", "task_soft_time_limit": "299.5"},
    {"task_time_limit": timedelta(minutes=5)},
    {"worker_prefetch_multiplier": 1.5},
    {"worker_prefetch_multiplier": "2"},
    {"worker_max_tasks_per_child": 1.5, "worker_max_memory_per_child": "200000"},
    {"broker_transport_options": {"visibility_timeout": timedelta(hours=1)}},
    {"broker_connection_retry": None, "task_ignore_result": None, "task_track_started": None},
    {"broker_use_ssl": None, "broker_failover_strategy": None},
    {"redis_password": 12345, "result_backend": "redis"},
    {"broker_heartbeat": "", "broker_connection_timeout": "", "broker_connection_max_retries": ""},
    {"result_expires": "3600", "redis_socket_timeout": "5", "redis_backend_health_check_interval": "30"},
]


@pytest.mark.parametrize("conf", STARTS, ids=lambda conf: ",".join(conf))
def test_what_celery_starts_with_is_started_with(conf: dict[str, Any]) -> None:
    start_celery(application(**conf))
    settle(application(**conf))


def test_what_they_mean_is_kept() -> None:
    settings, options = settle(application(task_time_limit="300", worker_prefetch_multiplier=1.5, event_queue_ttl=None))
    assert (options.time_limit, options.prefetch_multiplier) == (300.0, 1.5)
    assert settings.event_queue_ttl is None
    assert settle(application(worker_max_tasks_per_child=1.5))[1].max_tasks_per_child == 2
    assert settle(application(task_soft_time_limit=timedelta(seconds=9)))[1].soft_time_limit == 9.0


#: For every setting that the worker carries: a fraction, nothing, a name, and what is none of all.
ODD = (1.5, None, "odd", {"k": False})
NAMES = [name for name, entry in sorted(CARRIED.items()) if entry.how is How.NATIVE]


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_names_the_setting(name: str) -> None:
    """Whatever the value: it is taken, or the error says which setting it is; never anything else."""
    group = name.partition("_")[0]
    for value in ODD:
        try:
            settle(application(**{name: value}))
        except SettingsError as error:
            text = str(error)
            # A part of the broker's URL is shown in it.
            assert name in text or f"{group}_" in text or "result_backend" in text or "URL" in text, (value, text)


@pytest.mark.parametrize("name", [name for name in NAMES if _types().get(name) in ("int", "float")])
def test_numbers_in_any_form_are_numbers(name: str) -> None:
    for value in ("300", timedelta(seconds=300), ""):
        if name == "broker_port" and isinstance(value, timedelta):
            continue  # kombu writes it into the URL
        settle(application(**{name: value}))


def test_a_broker_of_ones_own_is_refused_by_its_name() -> None:
    with pytest.raises(SettingsError, match=r"'broker_url' names a broker of your own, toys:BROKER: .*kombu"):
        settle(application(broker="toys:BROKER://place"))


@pytest.mark.parametrize("url", ["bogus://x", "sqs://", "unix:///no.sock"])
def test_a_broker_that_fastq_or_kombu_does_not_know_is_the_projects_own_fault(url: str) -> None:
    with pytest.raises(SettingsError, match="broker_url"):
        CeleryProgram(application(broker=url)).begin(WorkerOptions())


@pytest.mark.since("5.5", "a database is opened at its first use")
def test_a_store_that_cannot_be_opened_is_no_fault_of_ours() -> None:
    app = application(result_backend="db+sqlite:////nonexistent/x.db")
    with pytest.raises(ConnectionLost, match=r"result_backend.*OperationalError.*unable to open database file"):
        settle(app)
