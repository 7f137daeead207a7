"""A Celery application's configuration as fastq's settings: spellings, environment, queues, and the table."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import celery
import pytest
from celery import signals
from celery.app.defaults import NAMESPACES, flatten
from kombu import Connection, Exchange, Queue, binding
from kombu.common import Broadcast

from fastq.brokers.redis.url import parse_redis_url
from fastq.celery.conf.carried import CARRIED, How, default_of, is_asked_for, not_carried, warnings_of
from fastq.celery.conf.settings import (
    _PLAIN,
    OWN_STORES,
    broker_url_of,
    is_given,
    own_store,
    queue_options,
    settings_of_app,
)
from fastq.errors import SettingsError
from fastq.queues import Topology, direct_queue
from fastq.settings import Settings
from fastq.worker.options import WorkerOptions
from tests import ROOT
from tests.support.servers import RabbitMQ

VARIABLES = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND")

#: Read by Celery's code without a default, or by its command line alone; from its documentation.
DOCUMENTED_ONLY = {
    *("override_backends", "cassandra_secure_bundle_path", "result_backend_thread_safe"),
    *("redis_backend_credential_provider", "redis_backend_health_check_interval", "redis_client_name"),
    *(f"{who}_{what}" for who in ("beat", "events", "worker") for what in ("executable", "gid", "logfile")),
    *(f"{who}_{what}" for who in ("beat", "events", "worker") for what in ("pidfile", "uid", "umask")),
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "FASTQ_BROKER_URL", "FASTQ_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def app_with(**conf: Any) -> celery.Celery:
    app = celery.Celery("proj", set_as_current=False)
    app.conf.update(conf)
    return app


def settings_with(**conf: Any) -> Settings:
    return settings_of_app(app_with(**conf))


def spec_of(app: celery.Celery, name: str) -> Any:
    return Topology(settings_of_app(app)).spec(name)


# --- values


def test_the_defaults_are_celerys() -> None:
    settings = settings_with()
    assert settings.broker_url == "amqp://guest:guest@localhost:5672//"
    assert settings.result_backend == "disabled"
    assert settings.fastq_reliable is False
    assert settings.broker_heartbeat == 120
    assert settings.broker_connection_max_retries == 100
    settings.freeze()
    assert settings.task_acks_late is False
    assert "worker_prefetch_multiplier" not in settings.changes()


def test_a_value_that_is_given_counts_as_given_even_when_it_is_the_default() -> None:
    assert "worker_prefetch_multiplier" in settings_with(worker_prefetch_multiplier=4).changes()


OLD = {"CELERY_ACKS_LATE": True, "BROKER_URL": "amqp://old//", "CELERYD_PREFETCH_MULTIPLIER": 7}
NEW = {"task_acks_late": True, "broker_url": "amqp://old//", "worker_prefetch_multiplier": 7}


class AsAttributes:
    CELERY_TASK_ACKS_LATE = True
    CELERY_BROKER_URL = "amqp://old//"
    CELERY_WORKER_PREFETCH_MULTIPLIER = 7
    CELERY_FASTQ_RELIABLE = True
    CELERY_FASTQ_GRACE_S = 5


@pytest.mark.parametrize(
    ("source", "namespace"), [(OLD, None), (NEW, None), (AsAttributes, "CELERY"), (vars(AsAttributes), "CELERY")]
)
def test_every_spelling_is_read(source: Any, namespace: str | None) -> None:
    app = celery.Celery("proj", set_as_current=False)
    app.config_from_object(source, namespace=namespace)
    settings = settings_of_app(app)
    assert settings.task_acks_late is True
    assert settings.broker_url == "amqp://old//"
    assert settings.worker_prefetch_multiplier == 7
    assert is_given(app, "task_acks_late")
    assert not is_given(app, "task_track_started")


def test_fastqs_own_settings_come_along_with_and_without_a_namespace() -> None:
    app = celery.Celery("proj", set_as_current=False)
    app.config_from_object(AsAttributes, namespace="CELERY")
    assert settings_of_app(app).fastq_reliable is True
    assert settings_of_app(app).fastq_grace_s == 5
    assert settings_with(fastq_reliable=True, fastq_max_deliveries=3).fastq_max_deliveries == 3


def test_a_reliable_application_acknowledges_late_unless_it_says_otherwise() -> None:
    reliable, early = settings_with(fastq_reliable=True), settings_with(fastq_reliable=True, task_acks_late=False)
    reliable.freeze()
    early.freeze()
    assert (reliable.task_acks_late, early.task_acks_late) == (True, False)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("result_expires", timedelta(hours=2), 7200.0),
        ("result_expires", 60, 60.0),
        ("result_expires", 0, None),
        ("result_expires", None, None),
        ("task_time_limit", "30", 30.0),
        ("worker_concurrency", "auto", None),
        ("worker_concurrency", "3", 3),
        ("broker_heartbeat", None, 0.0),
        ("broker_heartbeat", 15, 15.0),
        ("broker_connection_max_retries", 0, None),
        ("broker_connection_max_retries", None, None),
        ("broker_connection_timeout", None, 4.0),
        ("task_default_delivery_mode", "transient", 1),
        ("task_default_delivery_mode", 2, 2),
        ("accept_content", {"json"}, ("json",)),
        ("broker_use_ssl", {"cert_reqs": ssl.CERT_REQUIRED}, {"cert_reqs": ssl.CERT_REQUIRED}),
        ("broker_use_ssl", True, True),
        ("broker_transport_options", {"visibility_timeout": 60}, {"visibility_timeout": 60}),
        ("broker_failover_strategy", "shuffle", "shuffle"),
        ("broker_login_method", "PLAIN", "PLAIN"),
        ("task_queue_max_priority", 9, 9),
        ("worker_max_memory_per_child", 1000.0, 1000),
        ("worker_log_datefmt", "%H:%M", "%H:%M"),
        ("timezone", "Europe/Berlin", "Europe/Berlin"),
        ("worker_send_task_events", True, True),
        ("task_acks_late", 1, True),
        ("redis_backend_use_ssl", {"ssl_cert_reqs": "required"}, {"ssl_cert_reqs": "required"}),
    ],
)
def test_values_get_the_type_that_the_worker_wants(name: str, value: Any, expected: Any) -> None:
    found = settings_with(**{name: value})[name]
    assert found == expected
    assert type(found) is type(expected) or isinstance(expected, (dict, float))


def test_a_value_that_cannot_be_used_is_named() -> None:
    with pytest.raises(SettingsError, match="'task_time_limit' is 'soon'; expected a number"):
        settings_with(task_time_limit="soon")
    with pytest.raises(SettingsError, match="broker_failover_strategy"):
        settings_with(broker_failover_strategy=lambda servers: servers)


# --- the broker and the results


@pytest.mark.parametrize(
    ("conf", "expected"),
    [
        ({"broker_url": "redis://h:1/2"}, "redis://h:1/2"),
        ({"broker_url": "amqp://a//;amqp://b//"}, "amqp://a//;amqp://b//"),
        ({"broker_url": ["amqp://a//", "amqp://b//"]}, "amqp://a//;amqp://b//"),
        ({"broker_url": "amqp://w//", "broker_read_url": "amqp://r//"}, "amqp://r//"),
        ({"broker_url": "amqp://r//", "broker_write_url": "amqp://w//"}, "amqp://r//"),
        ({"broker_url": "rabbit"}, "amqp://guest:guest@rabbit:5672//"),
        (
            {"broker_url": "h", "broker_user": "u", "broker_password": "p/w", "broker_vhost": "v", "broker_port": 1},
            "amqp://u:p%2Fw@h:1/v",
        ),
        ({"broker_url": "h", "broker_transport": "redis", "broker_vhost": "3"}, "redis://h:6379/3"),
    ],
)
def test_the_broker_is_the_one_that_is_read_from(conf: dict[str, Any], expected: str) -> None:
    assert broker_url_of(app_with(**conf)) == expected


def test_the_environment_wins_as_it_does_in_celery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://environment//")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://environment/1")
    # Celery's own code does not read this one, and sends to another broker.
    monkeypatch.setenv("FASTQ_BROKER_URL", "amqp://elsewhere//")
    settings = settings_with(broker_url="amqp://conf//", result_backend="rpc://")
    settings.freeze()
    assert settings.broker_url == "amqp://environment//"
    assert settings.result_backend == "redis://environment/1"
    monkeypatch.setenv("CELERY_BROKER_READ_URL", "amqp://read//")
    assert settings_with(broker_url="amqp://conf//").broker_url == "amqp://read//"


@pytest.mark.parametrize(
    ("backend", "expected", "kind"),
    [
        (None, "disabled", "disabled"),
        ("rpc://", "rpc://", "rpc"),
        ("rpc", "rpc://", "rpc"),
        ("redis://:secret@h:1/2", "redis://:secret@h:1/2", "redis"),
        ("rediss://h:1/2?ssl_cert_reqs=required", "rediss://h:1/2?ssl_cert_reqs=required", "redis"),
        ("db+sqlite:///results.db", "disabled", ""),
        ("cache+memory://", "disabled", ""),
    ],
)
def test_the_worker_writes_only_to_the_stores_that_it_knows(backend: str | None, expected: str, kind: str) -> None:
    app = app_with(result_backend=backend)
    assert settings_of_app(app).result_backend == expected
    assert own_store(app.backend) == kind


def test_a_store_named_by_the_application_itself_wins() -> None:
    app = celery.Celery("proj", backend="redis://mine/1", set_as_current=False)
    assert settings_of_app(app).result_backend == "redis://mine/1"


def test_redis_settings_make_a_store_that_was_given_without_a_url() -> None:
    settings = settings_with(result_backend="redis", redis_host="h", redis_port=7, redis_db=3)
    assert settings.result_backend == "redis://"
    (url,) = parse_redis_url(settings.result_backend, settings, "results")
    assert (url.host, url.port, url.db) == ("h", 7, 3)


@pytest.mark.parametrize("backend", ["nosuchstore://", "nosuch.module:Backend"])
def test_a_store_that_celery_cannot_make_is_named(backend: str) -> None:
    with pytest.raises(SettingsError, match=r"'result_backend' cannot be used: .*nosuch"):
        settings_with(result_backend=backend)


@pytest.mark.since("5.7", "a class cannot be a result_backend")
def test_a_class_derived_from_a_known_store_is_not_that_store() -> None:
    from celery.backends.rpc import RPCBackend

    class Mine(RPCBackend):
        pass

    assert own_store(app_with(result_backend=Mine).backend) == ""
    assert set(OWN_STORES.values()) == {"redis", "rpc", "disabled"}


# --- queues


@pytest.mark.since("5.5", "there is no task_default_queue_type")
def test_the_default_queue_is_made_as_celery_makes_it() -> None:
    conf = {"task_default_queue": "mine", "task_default_exchange": "ex", "task_default_exchange_type": "topic"}
    app = app_with(**conf, task_default_routing_key="rk", task_default_queue_type="quorum")
    spec = spec_of(app, "mine")
    assert (spec.exchange, spec.exchange_type, spec.routing_key) == ("ex", "topic", "rk")
    assert spec.arguments == {"x-queue-type": "quorum"}
    # A queue that nobody declared is not of the default queue's type in Celery.
    assert spec_of(app, "other").arguments == {}


def test_missing_queues_follow_the_settings_for_them() -> None:
    app = app_with(task_create_missing_queue_type="quorum", task_create_missing_queue_exchange_type="topic")
    spec = spec_of(app, "other")
    assert (spec.arguments, spec.exchange, spec.exchange_type) == ({"x-queue-type": "quorum"}, "other", "topic")


def test_a_kombu_queue_keeps_all_that_it_says() -> None:
    exchange = Exchange("ex", type="topic", durable=False, auto_delete=True, arguments={"alternate-exchange": "lost"})
    queue = Queue(
        "q",
        exchange,
        routing_key="a.#",
        durable=False,
        auto_delete=True,
        queue_arguments={"x-queue-mode": "lazy"},
        binding_arguments={"b": 1},
        consumer_arguments={"x-priority": 5},
        expires=1.5,
        message_ttl=2,
        max_length=3,
        max_length_bytes=4,
        max_priority=5,
    )
    spec = spec_of(app_with(task_queues=[queue]), "q")
    assert (spec.exchange, spec.exchange_type, spec.routing_key) == ("ex", "topic", "a.#")
    assert (spec.durable, spec.auto_delete, spec.exclusive, spec.no_declare) == (False, True, False, False)
    assert (spec.exchange_durable, spec.exchange_auto_delete) == (False, True)
    assert spec.exchange_arguments == {"alternate-exchange": "lost"}
    assert spec.binding_arguments == {"b": 1}
    assert spec.consumer_arguments == {"x-priority": 5}
    assert spec.arguments == {
        "x-queue-mode": "lazy",
        "x-expires": 1500,
        "x-message-ttl": 2000,
        "x-max-length": 3,
        "x-max-length-bytes": 4,
        "x-max-priority": 5,
    }


def test_several_bindings_are_kept() -> None:
    one, two = Exchange("one"), Exchange("two", type="topic")
    queue = Queue("q", [binding(one, routing_key="a"), binding(two, routing_key="b.*", arguments={"x": 1})])
    spec = spec_of(app_with(task_queues=[queue]), "q")
    kept = {(each.exchange, each.exchange_type, each.routing_key) for each in spec.all_bindings}
    assert {("one", "direct", "a"), ("two", "topic", "b.*")} <= kept
    assert next(each.arguments for each in spec.all_bindings if each.exchange == "two") == {"x": 1}


def test_queues_given_as_a_dict_and_the_priority_for_all() -> None:
    app = app_with(task_queues={"a": {"exchange": "ea", "routing_key": "ka"}, "b": {}}, task_queue_max_priority=4)
    assert (spec_of(app, "a").exchange, spec_of(app, "a").routing_key) == ("ea", "ka")
    assert spec_of(app, "b").arguments == spec_of(app, "a").arguments == {"x-max-priority": 4}


def test_a_broadcast_queue_is_one_per_worker_and_found_by_its_alias() -> None:
    app = app_with(task_queues=[Queue("work"), Broadcast("news")])
    settings = settings_of_app(app)
    (name,) = set(WorkerOptions(hostname="w@h", queues=("news",)).resolved(settings).queues)
    spec = Topology(settings).spec(name)
    assert name.startswith("bcast.")
    assert (spec.exchange, spec.exchange_type, spec.auto_delete, spec.alias) == ("news", "fanout", True, "news")
    assert WorkerOptions(hostname="w@h").resolved(settings).queues == ("work", name)


@pytest.mark.since("5.7", "workers read every queue that is known")
def test_queues_that_are_only_known_are_declared_when_needed_and_not_read() -> None:
    app = app_with(task_queues=[Queue("work")])
    app.amqp.queues.add(Queue("elsewhere", Exchange("there"), routing_key="k"))
    app.amqp.queues.select_add(Queue("extra"))
    settings = settings_of_app(app)
    assert WorkerOptions(hostname="w@h").resolved(settings).queues == ("work", "extra")
    assert Topology(settings).spec("elsewhere").exchange == "there"


def test_queues_that_were_asked_for_are_made_by_celerys_own_code() -> None:
    app = app_with()
    app.amqp.autoexchange = lambda name: Exchange(f"x-{name}", type="topic")
    settings = settings_of_app(app, ["new"])
    assert Topology(settings).spec("new").exchange == "x-new"
    closed = app_with(task_create_missing_queues=False)
    assert [entry["name"] for entry in settings_of_app(closed, ["new"]).task_queues] == ["celery"]


def test_worker_direct_gives_the_worker_a_queue_that_celerys_clients_find() -> None:
    from celery.utils.nodenames import worker_direct

    theirs = worker_direct("w1@host")
    settings = settings_with(worker_direct=True)
    assert WorkerOptions(hostname="w1@host").resolved(settings).queues == ("celery", "w1@host.dq2")
    ours = Topology(settings).spec(direct_queue("w1@host"))
    assert (ours.name, ours.exchange, ours.routing_key) == (theirs.name, theirs.exchange.name, theirs.routing_key)


def queues_of_all_kinds() -> Iterator[Queue]:
    yield Queue("plain", Exchange("plain"), routing_key="plain")
    yield Queue("topic", Exchange("topics", type="topic"), routing_key="a.#", max_priority=3, message_ttl=60)
    yield Queue("quorum", Exchange("quorum"), routing_key="quorum", queue_arguments={"x-queue-type": "quorum"})
    yield Queue("many", [binding(Exchange("m1"), routing_key="k"), binding(Exchange("m2", type="fanout"))])
    yield Queue("bare", Exchange(""), routing_key="bare")
    yield Broadcast("news", queue="news-here")


@pytest.mark.rabbitmq
@pytest.mark.parametrize("queue", list(queues_of_all_kinds()), ids=lambda queue: str(queue.name))
def test_rabbitmq_finds_nothing_different_when_celery_and_fastq_declare_the_same_queue(
    rabbitmq: RabbitMQ, amqp_url: str, queue: Queue
) -> None:
    from fastq.brokers.rabbitmq.connection import connect_any
    from fastq.brokers.rabbitmq.url import Endpoints

    app = app_with(broker_url=amqp_url, task_queues=[queue])
    settings = settings_of_app(app)
    settings.freeze()
    ours = connect_any(Endpoints(amqp_url, settings), settings, "test", 10.0)
    with Connection(amqp_url) as theirs:
        declared = app.amqp.queues[queue.name]
        declared(theirs.default_channel).declare()
        # A difference closes the channel with 406, here or there.
        ours.declare(Topology(settings).spec(queue.name))
        declared(theirs.channel()).declare()
    ours.close()


# --- the table


@pytest.mark.since("5.7", "there are fewer settings")
def test_every_setting_of_celery_is_in_the_table_and_no_other() -> None:
    known = {name for name, _ in flatten(NAMESPACES)} | DOCUMENTED_ONLY
    assert set(CARRIED) == known
    assert len(CARRIED) == 231


def test_what_is_taken_over_has_a_place_in_fastqs_settings_and_an_entry_that_says_so() -> None:
    assert [name for name in _PLAIN if name not in Settings()] == []
    wrong = [name for name in _PLAIN if CARRIED[name].how not in (How.NATIVE, How.CELERY)]
    assert wrong == []


def test_every_entry_that_is_not_plain_says_why() -> None:
    silent = [name for name, entry in CARRIED.items() if entry.how is not How.NATIVE and not entry.note]
    assert silent == []
    assert [name for name, entry in CARRIED.items() if entry.accepts and not entry.note] == []


@pytest.mark.parametrize("name", sorted(name for name, entry in CARRIED.items() if entry.how is How.MISSING))
def test_a_setting_that_is_not_carried_is_one_line_at_the_start(name: str) -> None:
    value = "something else" if default_of(name) != "something else" else "another"
    app = app_with(**{name: value})
    (line,) = warnings_of(app)
    assert line.startswith(f"setting {name} = 'something else' is not carried by this version of fastq: ")
    assert is_asked_for(app, name)


def test_nothing_is_said_of_defaults_even_when_they_are_written_down() -> None:
    conf = {name: default_of(name) for name, entry in CARRIED.items() if entry.how is How.MISSING}
    assert warnings_of(app_with()) == []
    assert warnings_of(app_with(**conf)) == []


@pytest.mark.parametrize(
    ("name", "carried", "other"),
    [
        ("worker_pool", "package:Class", "swimming"),
        ("worker_pool", "solo", "custom"),  # nobody says which
        ("broker_failover_strategy", "shuffle", print),
        ("event_serializer", "json", "msgpack"),
    ],
)
def test_a_setting_of_which_some_values_are_carried_is_judged_by_its_value(
    name: str, carried: object, other: object
) -> None:
    assert list(not_carried(app_with(**{name: carried}))) == []
    assert [found for found, _ in not_carried(app_with(**{name: other}))] == [name]


def test_a_queue_is_an_entry_of_task_queues() -> None:
    options = queue_options(Queue("q", Exchange("e"), routing_key="k"))
    assert Topology(Settings({"task_queues": [options]})).spec("q").exchange == "e"


DOCUMENT = ROOT / "docs" / "celery.md"
NAME = re.compile(r"`((?:accept|beat|broker|control|event|events|fastq|redis|result|task|worker)_[a-z_]+)`")


def test_the_document_lists_what_is_not_carried_and_names_no_setting_that_does_not_exist() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    table = text.partition("| what happens instead |")[2].partition("\n## ")[0]
    missing = {name for name, entry in CARRIED.items() if entry.how is How.MISSING}
    assert missing <= set(NAME.findall(table))
    others = {name for name in NAME.findall(text) if name not in CARRIED and name not in Settings()}
    assert {name for name in others if not hasattr(signals, name)} == set()
