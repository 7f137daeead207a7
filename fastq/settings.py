"""Settings: their names, types and defaults in one table, and the checks that a wrong one fails early with a remedy.

The table is the class body of ``Settings``: an annotation is the type that is enforced, the value is the default.
Reads no files and opens nothing. Source of the names: Celery's lower-case settings; what starts with ``fastq_`` is our
own.
"""

from __future__ import annotations

import math
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastq.errors import SettingsError

#: Where a value came from; a later source wins over an earlier one, whatever the order of the calls.
DEFAULT, CONFIG, KEYWORD, ENVIRONMENT, ASSIGNED = range(5)

#: Environment variables that are read, the first one found wins.
ENVIRONMENT_NAMES = {
    "broker_url": ("FASTQ_BROKER_URL", "CELERY_BROKER_URL"),
    "result_backend": ("FASTQ_RESULT_BACKEND", "CELERY_RESULT_BACKEND"),
}

DEFAULT_BROKER_URL = "sqlite:///fastq.db"

#: Their values may hold passwords: an error shows only what kind of value it was.
_SECRET = frozenset(
    {"broker_url", "result_backend", "broker_use_ssl", "broker_transport_options"}
    | {"redis_password", "redis_backend_use_ssl", "result_backend_transport_options"}
)

#: A plain object is read for names that start so; anything else in it is none of our business.
_PREFIXES = ("broker_", "task_", "worker_", "result_", "fastq_", "accept_", "enable_", "event_", "control_")


class Settings:
    """Every setting as an attribute. Assigning checks name and type; after ``freeze()`` it raises SettingsError."""

    # Broker. None: the embedded broker in ./fastq.db. Several URLs (a list, or separated by ";") are tried in turn.
    broker_url: str | Sequence[str] | None = None
    broker_connection_timeout: float = 4.0
    broker_connection_retry: bool = True
    broker_connection_retry_on_startup: bool | None = None
    broker_connection_max_retries: int | None = (
        None  # None: for ever, as a worker without a broker has nothing else to do
    )
    broker_heartbeat: float = 10.0  # chosen: a dead peer is noticed in 20 s, where Celery's 120 s takes four minutes
    broker_login_method: str | None = None  # None: the best that the broker offers
    broker_failover_strategy: Literal["round-robin", "shuffle"] = "round-robin"
    # None: the delay queues of Celery's senders are not declared. A Celery application's worker does, as Celery's.
    broker_native_delayed_delivery_queue_type: Literal["classic", "quorum"] | None = None
    broker_transport_options: Mapping[str, Any] = types.MappingProxyType({})
    broker_use_ssl: bool | Mapping[str, Any] = False

    # Results. None: the same place as an embedded broker, "disabled" with AMQP.
    result_backend: str | None = None
    result_expires: float | None = 86400.0
    result_extended: bool = False
    result_failure_expires: float | None = None  # None: as result_expires
    result_serializer: str = "json"
    result_accept_content: Sequence[str] | None = None  # None: as accept_content
    result_compression: str | None = None
    result_backend_transport_options: Mapping[str, Any] = types.MappingProxyType({})

    # Redis as result store, beside result_backend. The broker's are in broker_transport_options.
    redis_host: str | None = None
    redis_port: int | None = None
    redis_db: int | None = None
    redis_username: str | None = None
    redis_password: str | None = None
    redis_backend_use_ssl: bool | Mapping[str, Any] | None = None
    redis_socket_timeout: float | None = 120.0
    redis_socket_connect_timeout: float | None = None  # None: as broker_connection_timeout
    redis_backend_health_check_interval: float | None = None  # None: 10 s

    # Tasks: where they go.
    task_default_queue: str = "celery"
    task_default_queue_type: Literal["classic", "quorum"] = "classic"
    task_default_delivery_mode: Literal[1, 2] = 2
    task_default_priority: int | None = None
    task_queue_max_priority: int | None = None
    task_queues: Sequence[str | Mapping[str, Any]] | Mapping[str, Any] | None = None
    task_create_missing_queues: bool = True
    task_create_missing_queue_type: Literal["classic", "quorum"] | None = None  # None: as task_default_queue_type
    task_create_missing_queue_exchange_type: str | None = None  # None: direct
    task_routes: Any = None

    # Tasks: how they are written.
    task_serializer: str = "json"
    task_compression: str | None = None
    accept_content: Sequence[str] = ("json",)
    task_publish_retry: bool = True
    task_publish_retry_policy: Mapping[str, Any] = types.MappingProxyType(
        {"max_retries": 3, "interval_start": 0.0, "interval_step": 0.2, "interval_max": 1.0}
    )

    # Tasks: how they run. None in task_acks_late: late when fastq_reliable.
    task_acks_late: bool | None = None
    task_ignore_result: bool = False
    task_track_started: bool = False
    task_time_limit: float | None = None
    task_soft_time_limit: float | None = None
    task_always_eager: bool = False
    task_eager_propagates: bool = False

    # Events, for monitors. The lifetimes are of a monitor's own queue, in seconds.
    task_send_sent_event: bool = False
    worker_send_task_events: bool = False
    event_exchange: str = "celeryev"
    event_queue_prefix: str = "celeryev"
    event_queue_ttl: float | None = 5.0
    event_queue_expires: float | None = 60.0
    event_queue_exclusive: bool = True
    event_queue_durable: bool = False

    # Worker.
    worker_direct: bool = False  # a queue of its own, <node name>.dq2
    worker_pool: str = "prefork"  # or "solo", or module:NAME
    worker_concurrency: int | None = None
    worker_pool_start_method: Literal["fork", "forkserver", "spawn"] | None = None  # None: what the application needs
    worker_prefetch_multiplier: float = 4
    worker_disable_prefetch: bool = False  # Redis only: take a message only when a child is free
    worker_eta_task_limit: int | None = None  # messages that wait for their time in the worker's memory
    worker_cancel_long_running_tasks_on_connection_loss: bool = False  # those that are acknowledged late
    worker_soft_shutdown_timeout: float = 0.0  # seconds that running tasks have to end before a cold stop
    worker_enable_soft_shutdown_on_idle: bool = False  # they have all of it, and when nothing runs, too
    worker_max_tasks_per_child: int | None = None
    worker_max_memory_per_child: int | None = None  # KiB of resident memory
    worker_hijack_root_logger: bool = True
    worker_log_color: bool | None = None
    worker_log_format: str = "[%(asctime)s: %(levelname)s/%(processName)s] %(message)s"
    worker_task_log_format: str = "[%(asctime)s: %(levelname)s/%(processName)s] %(task_name)s[%(task_id)s]: %(message)s"
    worker_log_datefmt: str | None = None
    worker_task_log_datefmt: str | None = None
    worker_redirect_stdouts: bool = True
    worker_redirect_stdouts_level: str = "WARNING"

    # Remote control.
    worker_enable_remote_control: bool = True
    worker_pool_restarts: bool = False
    worker_state_db: str | None = None
    control_exchange: str = "celery"
    control_queue_ttl: float | None = 300.0
    control_queue_expires: float | None = 10.0
    control_queue_exclusive: bool = True
    control_queue_durable: bool = False

    # General.
    include: Sequence[str] = ()
    imports: Sequence[str] = ()
    enable_utc: bool = True
    timezone: str | None = None  # of moments without one; None: they are refused

    # Our own.
    fastq_reliable: bool = True
    fastq_publish_timeout: float = 10.0
    fastq_max_message_bytes: int = 128 * 1024 * 1024
    fastq_max_held_bytes: int = 256 * 1024 * 1024  # of messages in a worker, above which it takes no more
    fastq_max_deliveries: int = 20
    fastq_max_child_deaths: int = 3
    fastq_grace_s: float = 25.0
    fastq_child_start_timeout: float | None = 300.0  # a child that is not ready by then is killed; None: never
    fastq_async_processes: int = 1  # for tasks that are coroutine functions; 0: they run among the others
    fastq_async_slots: int = 1000  # coroutines at a time in each of those
    fastq_loop_stall_s: float = 30.0  # an event loop that takes no turn for so long is killed and replaced; 0: never
    fastq_keeps_spare: bool = True  # False: a child's replacement starts when the child has ended

    _sources: dict[str, int]
    _frozen: bool

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        object.__setattr__(self, "_sources", {})
        object.__setattr__(self, "_frozen", False)
        for name, value in (values or {}).items():
            self._put(name, value, KEYWORD)

    def __setattr__(self, name: str, value: Any) -> None:
        self._put(name, value, ASSIGNED)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, _known(name))

    def __setitem__(self, name: str, value: Any) -> None:
        self._put(name, value, ASSIGNED)

    def __contains__(self, name: object) -> bool:
        return name in _hints()

    def __repr__(self) -> str:
        changed = ", ".join(f"{name}={_shown(name, getattr(self, name))}" for name in sorted(self._sources))
        return f"<Settings {changed or 'all default'}>"

    def update(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Assign several settings."""
        for name, value in {**(values or {}), **more}.items():
            self._put(name, value, ASSIGNED)

    def load(self, values: Mapping[str, Any]) -> None:
        """Take the settings of a configuration; they give way to keywords, the environment and assignments."""
        for name, value in values.items():
            self._put(name, value, CONFIG)

    def changes(self) -> dict[str, Any]:
        """Return the settings that do not have their default."""
        return {name: getattr(self, name) for name in sorted(self._sources)}

    def given(self) -> dict[str, Any]:
        """Return the settings that somebody has set, in values that pickle."""
        return {
            name: dict(value) if isinstance(value, types.MappingProxyType) else value
            for name, value in self.changes().items()
        }

    def freeze(self) -> None:
        """Read the environment, fill in what follows from other settings, and refuse changes from now on."""
        if self._frozen:
            return
        for name, variables in ENVIRONMENT_NAMES.items():
            value = next(filter(None, map(os.environ.get, variables)), None)
            if value is not None:
                self._put(name, value, ENVIRONMENT)
        self._resolve()
        object.__setattr__(self, "_frozen", True)

    @contextmanager
    def override(self, **values: Any) -> Iterator[Settings]:
        """Change settings for the duration of a ``with`` block, frozen or not; ``FastQ.override`` is the way in."""
        saved, sources, frozen = dict(self.__dict__), dict(self._sources), self._frozen
        object.__setattr__(self, "_frozen", False)
        try:
            if frozen:
                self._unresolve()
            self.update(values)
            if frozen:
                self._resolve()
            object.__setattr__(self, "_frozen", frozen)
            yield self
        finally:
            self.__dict__.clear()
            self.__dict__.update(saved)
            object.__setattr__(self, "_sources", sources)

    def _put(self, name: str, value: Any, source: int) -> None:
        hint = _hints()[_known(name)]
        if self._frozen:
            raise SettingsError(
                f"setting {name!r} cannot change any more: the application is in use. "
                "Set it before the first task is sent; in a test use `with app.override(...)`"
            )
        if not _fits(value, hint):
            raise SettingsError(f"setting {name!r} is {_shown(name, value)}; expected {_words(hint)}")
        if source >= self._sources.get(name, DEFAULT):
            object.__setattr__(self, name, _immutable(value))
            self._sources[name] = source

    def _unresolve(self) -> None:
        """Forget what followed from other settings."""
        for name in ("broker_url", "result_backend", "task_acks_late"):
            if name not in self._sources:
                object.__setattr__(self, name, None)

    def _resolve(self) -> None:
        broker_url = self.broker_url or DEFAULT_BROKER_URL
        if not isinstance(broker_url, str):
            broker_url = ";".join(broker_url)
        object.__setattr__(self, "broker_url", broker_url)
        if self.result_backend is None:
            embedded = broker_url.lower().startswith(("sqlite:", "memory:"))
            object.__setattr__(self, "result_backend", broker_url if embedded else "disabled")
        elif self.result_backend.lower() in ("disabled", "disabled://"):
            object.__setattr__(self, "result_backend", "disabled")
        if self.task_acks_late is None:
            object.__setattr__(self, "task_acks_late", self.fastq_reliable)


def settings_of(source: object, namespace: str | None = None) -> dict[str, Any]:
    """Return the settings in a mapping, module or other object, under their lower-case names.

    With a namespace, exactly the names ``<NAMESPACE>_<SETTING>`` in upper case count, as in Django. Without one, every
    key of a mapping counts, and of an object the names that are settings or look like one. Names are checked when they
    are set.
    """
    names = source if isinstance(source, Mapping) else vars(source).keys() | _class_names(source)
    if namespace:
        prefix = namespace.upper().rstrip("_") + "_"
        chosen = {name: name[len(prefix) :].lower() for name in names if name.startswith(prefix)}
    elif isinstance(source, Mapping):
        chosen = {name: name for name in names}
    else:
        chosen = {name: name for name in names if name in _hints() or name.startswith(_PREFIXES)}
    if isinstance(source, Mapping):
        return {setting: source[name] for name, setting in chosen.items()}
    return {setting: getattr(source, name) for name, setting in sorted(chosen.items())}


def _class_names(source: object) -> set[str]:
    classes = source.__mro__ if isinstance(source, type) else type(source).__mro__
    return {name for cls in classes if cls is not object for name in vars(cls)}


@cache
def _hints() -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(Settings).items() if not name.startswith("_")}


def _known(name: str) -> str:
    """Return the name if it is a setting; else raise SettingsError with the nearest one."""
    if name in _hints():
        return name
    import difflib  # only needed on the way to an error

    meant = _lower_case(str(name))
    absent = _absent(meant)
    if absent is not None:
        raise SettingsError(f"setting {name!r} is Celery's, and FastQ applications have not got it (yet): {absent}")
    option = meant.removeprefix("worker_").replace("_", "")
    if option in _WORKER_OPTIONS:
        raise SettingsError(f"unknown setting {name!r}; it is an option: `fastq -A <module> worker --{option}`")
    nearest = difflib.get_close_matches(meant, _hints(), n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "no setting has a similar name"
    raise SettingsError(f"unknown setting {name!r}; {hint}")


#: Options of the worker's command that are no settings, though with ``worker_`` before them they look like some.
_WORKER_OPTIONS = frozenset(
    {"pidfile", "logfile", "loglevel", "hostname", "autoscale", "detach", "uid", "gid", "umask", "executable"}
)

#: How Celery's old names begin, and how the lower-case ones do that they became.
_OLD_STARTS = {
    "celeryd_": ("worker_", ""),
    "celerybeat_": ("beat_",),
    "celery_": ("", "task_", "worker_"),
}

#: Old names that became others.
_RENAMED = {
    "celery_eager_propagates_exceptions": "task_eager_propagates",
    "celery_max_cached_results": "result_cache_max",
    "celery_message_compression": "task_compression",
    "celery_result_dburi": "database_url",
    "celery_result_db_short_lived_sessions": "database_short_lived_sessions",
    "celery_result_db_tablenames": "database_table_names",
    "celery_result_engine_options": "database_engine_options",
    "celery_send_events": "worker_send_task_events",
    "celery_send_task_sent_event": "task_send_sent_event",
    "celery_task_result_expires": "result_expires",
    "celeryd_worker_lost_wait": "worker_lost_wait",
}


def _lower_case(name: str) -> str:
    """Return the lower-case name of what is in upper case, begins with ``CELERY_`` or is one of Celery's old names."""
    lower = name.lower()
    if lower in _RENAMED:
        return _RENAMED[lower]
    start = next((start for start in _OLD_STARTS if lower.startswith(start)), None)
    if start is None:
        return lower
    names = [new + lower.removeprefix(start) for new in _OLD_STARTS[start]]
    return next((name for name in names if name in _hints() or _absent(name) is not None), names[0])


#: Settings of Celery's that are not here, and what there is instead; ``beat_`` stands for all that begin so.
_ABSENT = {
    "beat_": "there is no scheduler; let cron or a systemd timer run `fastq -A <module> call <task>`",
    "task_annotations": "give the options to @app.task(...), or a base class",
    "task_default_rate_limit": "give limits to running workers: `fastq control rate_limit <task> 10/m`",
    "worker_disable_rate_limits": "there are none but those given by `fastq control rate_limit`",
    "worker_autoscaler": "use --autoscale",
    "task_reject_on_worker_lost": "fastq_reliable, the default, runs a call again whose process died",
    "task_retry_on_worker_lost": "fastq_reliable, the default, runs a call again whose process died",
    "task_acks_on_": "a call that failed or ran too long is acknowledged",
    "task_default_exchange": "task_default_queue is enough; task_routes may name an exchange",
    "task_default_exchange_type": "task_default_queue is enough; task_queues may give a queue an exchange_type",
    "task_default_routing_key": "task_default_queue is enough; task_routes may name a routing_key",
    "result_chord_": "there are no chords",
    "security_": "messages are not signed",
}
_BY_HINT = {
    "say it in broker_url": """broker_read_url broker_write_url broker_transport broker_host broker_port broker_user
        broker_password broker_vhost""",
    "results are kept in sqlite://, redis:// or rpc://": """database_ mongodb_ cassandra_ elasticsearch_ cache_backend
        cache_backend_options s3_ azureblockblob_ gcs_ couchbase_ arangodb_ cosmosdbsql_""",
    "leave it out": """result_exchange result_exchange_type result_persistent result_cache_max
        result_backend_always_retry result_backend_max_retries result_backend_max_sleep_between_retries_ms
        result_backend_base_sleep_between_retries_ms task_protocol task_inherit_parent_priority
        task_store_eager_result task_remote_tracebacks task_repr_maxlevels task_store_errors_even_if_ignored
        task_allow_error_cb_on_chord_header worker_agent worker_consumer worker_deduplicate_successful_tasks
        worker_lost_wait worker_proc_alive_timeout worker_timer worker_timer_precision
        worker_pool_putlocks worker_enable_prefetch_count_reduction
        worker_detect_quorum_queues broker_pool_limit broker_pool_acquire_timeout broker_channel_error_retry
        broker_heartbeat_checkrate event_serializer redis_max_connections redis_retry_on_timeout
        redis_socket_keepalive""",
}
_ABSENT |= {name: hint for hint, names in _BY_HINT.items() for name in names.split()}


def _absent(name: str) -> str | None:
    """Return what there is instead of a setting of Celery's that is not here; None for other names."""
    found = _ABSENT.get(name)
    return found or next((hint for start, hint in _ABSENT.items() if start[-1] == "_" and name.startswith(start)), None)


def takes_none(name: str) -> bool:
    """Whether a setting may be None."""
    return _fits(None, _hints()[_known(name)])


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the annotated type. Numbers are finite and not negative: no setting has a use for others."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is Sequence:
        return isinstance(value, (list, tuple, set, frozenset)) and all(_fits(item, parts[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if hint is Any:
        return True
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    """Return a type as an error message names it."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is Sequence:
        return f"a list of {_words(parts[0])}"
    if origin is Mapping:
        return "a dict with text keys"
    named = {int: "an int >= 0", float: "a number >= 0", bool: "True or False", type(None): "None"}
    return named.get(hint) or str(hint.__name__)


def _shown(name: str, value: object) -> str:
    if name in _SECRET:
        return f"a value of type {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _immutable(value: Any) -> Any:
    if isinstance(value, (list, set, frozenset)):
        return tuple(value)
    return types.MappingProxyType(dict(value)) if isinstance(value, dict) else value
