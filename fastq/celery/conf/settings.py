"""A Celery application's configuration as fastq's settings: what the worker itself needs, in the types it wants.

Celery reads the configuration: every spelling, namespace, default and environment variable is its business, and
``app.conf`` its answer. Opens no connection. What only Celery's own code needs stays there (``carried.py`` says what).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import celery
from celery.app.defaults import NAMESPACES, flatten
from celery.exceptions import ImproperlyConfigured
from kombu import Connection, Exchange, Queue
from kombu.exceptions import KombuError

from fastq.errors import ConnectionLost, FastqError, SettingsError
from fastq.net.urls import scheme_of
from fastq.settings import Settings, takes_none

#: Result stores that the worker writes itself, by their class; every other one is written in the child.
OWN_STORES = {
    "celery.backends.redis.RedisBackend": "redis",
    "celery.backends.redis.SentinelBackend": "redis",
    "celery.backends.rpc.RPCBackend": "rpc",
    "celery.backends.base.DisabledBackend": "disabled",
}

#: Where Celery looks for a broker when nobody says where it is.
DEFAULT_BROKER_URL = "amqp://guest:guest@localhost:5672//"

#: Taken as they are, once they have the type that Celery declares for them.
_PLAIN = (
    *("broker_connection_retry", "broker_connection_retry_on_startup", "broker_login_method"),
    *("broker_transport_options", "broker_use_ssl", "broker_failover_strategy"),
    "broker_native_delayed_delivery_queue_type",
    *("control_exchange", "control_queue_expires", "control_queue_ttl", "control_queue_exclusive"),
    *("control_queue_durable", "worker_enable_remote_control"),
    *("event_queue_prefix", "event_queue_ttl", "event_queue_expires", "event_queue_exclusive", "event_queue_durable"),
    *("event_exchange", "worker_send_task_events", "task_send_sent_event"),
    *("result_extended", "result_serializer", "result_compression"),
    *("result_backend_transport_options", "result_expires", "result_failure_expires"),
    *("redis_host", "redis_port", "redis_db", "redis_username", "redis_password", "redis_backend_use_ssl"),
    *("redis_socket_timeout", "redis_socket_connect_timeout", "redis_backend_health_check_interval"),
    "accept_content",
    *("task_acks_late", "task_ignore_result", "task_track_started", "task_time_limit", "task_soft_time_limit"),
    *("task_serializer", "task_compression", "task_publish_retry", "task_publish_retry_policy"),
    *("task_default_queue", "task_create_missing_queues", "task_create_missing_queue_type"),
    *("task_create_missing_queue_exchange_type", "task_queue_max_priority", "task_default_priority"),
    *(
        "worker_direct",
        "worker_prefetch_multiplier",
        "worker_disable_prefetch",
        "worker_enable_soft_shutdown_on_idle",
        "worker_max_tasks_per_child",
        "worker_max_memory_per_child",
    ),
    *("worker_state_db", "worker_pool_restarts", "worker_cancel_long_running_tasks_on_connection_loss"),
    *("worker_hijack_root_logger", "worker_log_color", "worker_log_format", "worker_task_log_format"),
    *("worker_log_datefmt", "worker_task_log_datefmt", "worker_redirect_stdouts", "worker_redirect_stdouts_level"),
)

#: Settings that Celery declares as something else, or not at all, although they are numbers.
_NUMBERS = {
    "task_default_priority": "int",
    "task_queue_max_priority": "int",
    "redis_backend_health_check_interval": "float",
    "worker_prefetch_multiplier": "float",
}

#: A part of one of these is one more: a child is replaced after its second task where 1.5 are allowed.
_ROUNDED_UP = {
    "broker_connection_max_retries",
    "worker_eta_task_limit",
    "worker_max_memory_per_child",
    "worker_max_tasks_per_child",
}

_DELIVERY_MODES = {"transient": 1, "persistent": 2, "1": 1, "2": 2}


def default_app() -> celery.Celery:
    """Return Celery's default application; its configuration has been read, and what fails in it was raised."""
    app: celery.Celery = celery.current_app._get_current_object()
    app.conf.finalize()
    return app


def settings_of_app(app: celery.Celery, queues: Sequence[str] = ()) -> Settings:
    """Return the settings of a worker for a Celery application; they are not frozen yet.

    ``queues`` are the names that the worker was told to read: Celery's own code decides how those that it does not know
    are made. Raises SettingsError for a value that the worker cannot use.
    """
    with blaming("task_annotations"):
        for each in app.annotations:
            _ = each.annotate  # one that is named by its place is imported
    app.finalize()
    settings = Settings()
    # Celery acknowledges early and forgets what a lost worker held; an application that wants more says so.
    settings.load({"fastq_reliable": False})
    settings.load({name: value for name, value in _values(app) if _says_something(app, settings, name, value)})
    with blaming("task_queues", "a setting of queues"):
        settings.load({"task_queues": list(_queues(app, queues))})
    # As if assigned: Celery has read the environment, and its own code in the children follows that.
    settings.broker_url = broker_url_of(app)
    if ":" in (own := scheme_of(settings.broker_url)):
        raise SettingsError(
            f"'broker_url' names a broker of your own, {own}: that is for FastQ applications. Celery's own code sends "
            "here too and needs one that kombu has, such as amqp:// or redis://"
        )
    settings.result_backend = result_backend_of(app)
    return settings


def _values(app: celery.Celery) -> Iterator[tuple[str, Any]]:
    conf = app.conf
    for name in _PLAIN:
        yield name, _typed(name, conf.get(name))
    yield "broker_heartbeat", _typed("broker_heartbeat", conf.broker_heartbeat) or 0.0
    yield "worker_eta_task_limit", _typed("worker_eta_task_limit", conf.get("worker_eta_task_limit"), "int") or None
    soft_s = conf.get("worker_soft_shutdown_timeout")  # since Celery 5.5
    yield "worker_soft_shutdown_timeout", _typed("worker_soft_shutdown_timeout", soft_s) or 0.0
    yield "broker_connection_timeout", _typed("broker_connection_timeout", conf.broker_connection_timeout) or 4.0
    yield (
        "broker_connection_max_retries",
        _typed("broker_connection_max_retries", conf.broker_connection_max_retries) or None,
    )
    count = conf.worker_concurrency
    yield "worker_concurrency", None if count == "auto" else _typed("worker_concurrency", count, "int")
    yield "timezone", None if conf.timezone is None else str(conf.timezone)
    mode = conf.task_default_delivery_mode
    yield "task_default_delivery_mode", _DELIVERY_MODES.get(str(mode), mode)
    if is_given(app, "worker_pool_start_method"):
        yield "worker_pool_start_method", _typed("worker_pool_start_method", conf.get("worker_pool_start_method"))
    if is_given(app, "worker_proc_alive_timeout"):
        yield "fastq_child_start_timeout", _typed("worker_proc_alive_timeout", conf.worker_proc_alive_timeout)
    for name in Settings.__annotations__:
        if name.startswith("fastq_") and name in conf:
            yield name, conf[name]


def _says_something(app: celery.Celery, settings: Settings, name: str, value: Any) -> bool:
    """Whether a value is to be taken: what nobody gives and is our default too is not a change."""
    if name not in settings:
        return False
    if is_given(app, name):
        # None where there must be something is no wish either.
        return value is not None or (settings[name] is not None and takes_none(name))
    # Celery's None is a default of its own code; whether acknowledgements are late follows from fastq_reliable.
    return value is not None and value != settings[name] and name != "task_acks_late"


def is_given(app: celery.Celery, name: str) -> bool:
    """Whether the application says a setting at all, be it with its default value, in whatever spelling."""
    conf = app.conf.finalize()  # reads the configuration, if nobody did yet
    return any(spelling in source for source in conf.maps[:-1] for spelling in spellings(conf, name))


def spellings(conf: Any, name: str) -> tuple[str, ...]:
    """Return the names under which Celery looks for a setting, those of old times last."""
    # In ``_to_keys`` those of old times stand since Celery 5.7 only.
    return tuple(dict.fromkeys((*conf._to_keys(name), *(old(name) for old in conf._keys or ()))))


def _typed(name: str, value: Any, kind: str = "") -> Any:
    """Return a value in the type that Celery declares for the setting. Raises SettingsError for a wrong number."""
    kind = kind or _NUMBERS.get(name) or _types().get(name, "")
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if name in ("broker_use_ssl", "redis_backend_use_ssl") and isinstance(value, Mapping):
        return value
    if name in ("result_expires", "result_failure_expires") and not value:
        return None  # both mean: for ever
    if kind == "bool":
        return None if value is None and takes_none(name) else bool(value)
    if kind == "string":
        return _as_text(value)
    if value is None or kind not in ("int", "float", "list"):
        return value
    if kind == "list":
        with blaming(name):
            return [value] if isinstance(value, str) else list(value)
    # As for Celery, nothing in whatever form is not given.
    return None if value in ("", (), [], {}) else number_of(f"setting {name!r}", value, kind, name in _ROUNDED_UP)


def _as_text(value: Any) -> Any:
    """Return a number as text: a password or virtual host of digits is written as one."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def number_of(what: str, value: Any, kind: str = "float", rounds_up: bool = False) -> Any:
    """Return a number that may be text, or a span of time in seconds. Raises SettingsError that says what it is not."""
    try:
        number = value.total_seconds() if isinstance(value, timedelta) else float(value)
        if kind == "int" and (rounds_up or number == int(number)):
            return math.ceil(number)
    except (TypeError, ValueError, OverflowError):
        raise SettingsError(f"{what} is {str(value)[:80]!r}; expected a number") from None
    return number


@contextmanager
def blaming(*names: str) -> Iterator[None]:
    """Have what Celery's own code makes of a setting's value fail with an error that names the setting."""
    try:
        yield
    except (ArithmeticError, AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        others = f" (or is it {', '.join(names[1:])}?)" if names[1:] else ""
        text = f"setting {names[0]!r} cannot be used: {type(error).__name__}: {error}{others}"
        raise SettingsError(text) from error


@cache
def _types() -> dict[str, str]:
    return {name: option.type for name, option in flatten(NAMESPACES)}


# --- where the broker and the results are


def broker_url_of(app: celery.Celery) -> str:
    """Return the URL from which the worker consumes, or several with ``;`` between. It may hold a password."""
    with blaming("broker_url", *(f"broker_{name}" for name in ("user", "password", "vhost", "port", "transport"))):
        return _broker_url(app.conf)


def _broker_url(conf: Any) -> str:
    url = conf.broker_read_url
    if isinstance(url, (list, tuple)):
        url = ";".join(url)
    parts = {
        "userid": _as_text(conf.broker_user),
        "password": _as_text(conf.broker_password),
        "virtual_host": _as_text(conf.broker_vhost),
        "port": conf.broker_port,
        "transport": conf.broker_transport,
    }
    if not any(parts.values()) and (not url or "://" in url):
        return url or DEFAULT_BROKER_URL
    # Bare host names and the parts that URLs replaced: kombu puts them together.
    return str(Connection(url, **parts).as_uri(include_password=True))


def result_backend_of(app: celery.Celery) -> str:
    """Return the URL of a result store that the worker writes itself, else "disabled": the child writes the results."""
    backend = backend_of(app)
    kind = own_store(backend)
    if kind != "redis":
        return "rpc://" if kind == "rpc" else "disabled"
    named = app.backend_cls or app.conf.result_backend
    # Without a URL, the settings redis_host and so on say where it is, and they are carried.
    return named if isinstance(named, str) and "://" in named else "redis://"


def backend_of(app: celery.Celery) -> Any:
    """Return the application's result store as Celery makes it.

    Raises SettingsError when Celery cannot, and ConnectionLost when the store does not let itself be opened.
    """
    try:
        with blaming("result_backend", "another setting of results"):
            return app.backend
    except (ImproperlyConfigured, KombuError) as error:
        raise SettingsError(f"setting 'result_backend' cannot be used: {error}") from error
    except FastqError:
        raise
    except Exception as error:  # the store's own: a database opens its file, or makes its tables
        text = f"the result store (result_backend) cannot be opened: {type(error).__name__}: {error}. Is it there?"
        raise ConnectionLost(text) from error


def own_store(backend: object) -> str:
    """Return "redis", "rpc" or "disabled" when the worker writes to such a store itself, else ""."""
    kind = type(backend)
    return OWN_STORES.get(f"{kind.__module__}.{kind.__qualname__}", "")


# --- queues


def _queues(app: celery.Celery, asked: Sequence[str]) -> Iterator[dict[str, Any]]:
    known = app.amqp.queues
    for name in asked:
        if app.conf.task_create_missing_queues or name in known or name in known.aliases:
            known[name]  # makes it, if it is missing
    read = {queue.name for queue in known.consume_from.values()}
    for queue in known.values():
        yield queue_options(queue) | ({} if queue.name in read else {"consume": False})


def queue_options(queue: Queue) -> dict[str, Any]:
    """Return a kombu queue as an entry of fastq's ``task_queues``."""
    options = {
        "name": queue.name,
        "alias": queue.alias,
        "routing_key": queue.routing_key or "",
        "durable": bool(queue.durable),
        "exclusive": bool(queue.exclusive),
        "auto_delete": bool(queue.auto_delete),
        "no_declare": bool(queue.no_declare),
        "queue_arguments": _queue_arguments(queue),
        "binding_arguments": dict(queue.binding_arguments or {}),
        "consumer_arguments": dict(queue.consumer_arguments or {}),
        "bindings": [_binding(each) for each in queue.bindings],
        # No exchange at all is the broker's own one, which needs no binding.
        **(_exchange(queue.exchange) if queue.exchange else {"exchange": ""}),
    }
    return {name: value for name, value in options.items() if value not in (None, {}, [])}


def _queue_arguments(queue: Queue) -> dict[str, Any]:
    lifetimes = {"x-expires": queue.expires, "x-message-ttl": queue.message_ttl}
    counts = {
        "x-max-length": queue.max_length,
        "x-max-length-bytes": queue.max_length_bytes,
        "x-max-priority": queue.max_priority,
    }
    arguments = dict(queue.queue_arguments or {})
    arguments |= {name: int(value * 1000) for name, value in lifetimes.items() if value is not None}
    return arguments | {name: int(value) for name, value in counts.items() if value is not None}


def _binding(binding: Any) -> dict[str, Any]:
    options = {"routing_key": binding.routing_key or "", "arguments": dict(binding.arguments or {})}
    return _exchange(binding.exchange) | options


def _exchange(exchange: Exchange) -> dict[str, Any]:
    return {
        "exchange": str(exchange.name or ""),
        "exchange_type": exchange.type,
        "exchange_durable": bool(exchange.durable),
        "exchange_auto_delete": bool(exchange.auto_delete),
        "exchange_passive": bool(exchange.passive),
        "exchange_no_declare": bool(exchange.no_declare),
        "exchange_arguments": dict(exchange.arguments or {}),
    }
