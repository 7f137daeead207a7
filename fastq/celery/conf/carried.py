"""How each of Celery's settings is treated by fastq's worker: one table, and what a worker says about it at its start.

A value of a setting counts as asking for something only when it differs from Celery's default. Reads no configuration
of its own; it looks at ``app.conf``. Source of the names: ``celery.app.defaults`` of Celery 5.7, and its documentation
for the few that are read without a default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import celery
from celery.app.defaults import DEFAULTS

from fastq.celery.conf.pools import pool_name
from fastq.errors import SettingsError


class How(Enum):
    """Who does what a setting asks for."""

    NATIVE = "carried"
    CELERY = "handled by Celery's own code"
    ELSEWHERE = "about another command"
    MEANINGLESS = "without meaning here"
    MISSING = "not carried yet"


@dataclass(frozen=True)
class Entry:
    """What becomes of a setting and, where that is not plain, why. ``accepts`` says which values are carried."""

    how: How
    note: str = ""
    accepts: Callable[[Any], bool] | None = None


def _all(how: How, names: str, note: str = "") -> dict[str, Entry]:
    return dict.fromkeys(names.split(), Entry(how, note))


def _prefixed(prefix: str, how: How, names: str, note: str) -> dict[str, Entry]:
    return {f"{prefix}_{name}": Entry(how, note) for name in names.split()}


def _is_pool(value: Any) -> bool:
    try:
        return bool(pool_name(value))
    except SettingsError:  # where the pool is to be this one, it is said then
        return False


def _one_of(*values: object) -> Callable[[Any], bool]:
    return lambda value: value in values


_STORE = "the result store is written by Celery's own code in the child"
_STORES = (
    _prefixed("arangodb", How.CELERY, "backend_settings", _STORE)
    | _prefixed(
        "azureblockblob",
        How.CELERY,
        "base_path connection_timeout container_name read_timeout retry_increment_base retry_initial_backoff_sec "
        "retry_max_attempts",
        _STORE,
    )
    | _prefixed("cache", How.CELERY, "backend backend_options", _STORE)
    | _prefixed(
        "cassandra",
        How.CELERY,
        "auth_kwargs auth_provider bundle_path entry_ttl keyspace options port read_consistency secure_bundle_path "
        "servers table write_consistency",
        _STORE,
    )
    | _prefixed(
        "cosmosdbsql",
        How.CELERY,
        "collection_name consistency_level database_name max_retry_attempts max_retry_wait_time",
        _STORE,
    )
    | _prefixed("couchbase", How.CELERY, "backend_settings", _STORE)
    | _prefixed(
        "database",
        How.CELERY,
        "create_tables_at_setup engine_callback engine_options short_lived_sessions table_names table_schemas url",
        _STORE,
    )
    | _prefixed("elasticsearch", How.CELERY, "max_retries retry_on_timeout save_meta_as_text timeout", _STORE)
    | _prefixed("gcs", How.CELERY, "base_path bucket project ttl", _STORE)
    | _prefixed("mongodb", How.CELERY, "backend_settings", _STORE)
    | _prefixed("s3", How.CELERY, "access_key_id base_path bucket endpoint_url region secret_access_key", _STORE)
)

_SENDING = "sending is done by Celery's own code"
_TASK = "an attribute of each task, set by Celery's own code and carried from there"
_QUEUES = "part of the queues that Celery's own code makes, which are carried"
_CHILD = "the child loads and runs tasks by Celery's own code"
_TRACED = "with another value tasks run through Celery's own tracer, which stores the results"
_CHORD = "chords are Celery's own code, in the child"
_BEAT = "read by celery beat"
_MONITOR = "read by fastq events, and by others that watch events"
_URL = "part of the broker's URL"
_OPTION = "an option of the command line"

CARRIED: Mapping[str, Entry] = (
    _STORES
    # General.
    | _all(How.NATIVE, "accept_content timezone")
    | _all(How.CELERY, "enable_utc", "moments in messages carry their zone, written by Celery's own code")
    | _all(How.CELERY, "imports include", _CHILD)
    | _all(How.CELERY, "override_backends", _STORE)
    # Broker.
    | _all(How.NATIVE, "broker_url broker_read_url broker_use_ssl broker_transport_options")
    | _all(How.NATIVE, "broker_host broker_port broker_user broker_password broker_vhost broker_transport", _URL)
    | _all(
        How.NATIVE,
        "broker_connection_timeout broker_connection_retry broker_connection_retry_on_startup "
        "broker_connection_max_retries broker_heartbeat broker_login_method",
    )
    | {
        "broker_failover_strategy": Entry(
            How.NATIVE,
            "a function cannot be asked; round-robin and shuffle are carried",
            _one_of(None, "round-robin", "shuffle"),
        ),
        "broker_write_url": Entry(How.CELERY, "what tasks send goes there; replies of rpc:// go to broker_read_url"),
        "broker_channel_error_retry": Entry(How.MEANINGLESS, "a channel error never ends the worker: it reconnects"),
        "broker_heartbeat_checkrate": Entry(How.MEANINGLESS, "heartbeats are checked four times in each interval"),
        "broker_native_delayed_delivery_queue_type": Entry(How.NATIVE, "the worker declares them for quorum queues"),
    }
    | _all(How.CELERY, "broker_pool_limit broker_pool_acquire_timeout", _SENDING)
    # Remote control and events.
    | _all(
        How.NATIVE,
        "control_exchange control_queue_durable control_queue_exclusive control_queue_expires control_queue_ttl "
        "worker_enable_remote_control",
    )
    | _all(How.NATIVE, "event_exchange worker_send_task_events task_send_sent_event")
    | {"event_serializer": Entry(How.NATIVE, "events are written as JSON, which every monitor reads", _one_of("json"))}
    | _all(
        How.NATIVE,
        "event_queue_durable event_queue_exclusive event_queue_expires event_queue_prefix event_queue_ttl",
        _MONITOR,
    )
    | _prefixed("events", How.ELSEWHERE, "executable gid logfile pidfile uid umask", "read by celery events")
    # Beat.
    | _prefixed(
        "beat",
        How.ELSEWHERE,
        "cron_starting_deadline enable_remote_control executable gid logfile max_loop_interval pidfile "
        "remote_control_max_tick_age schedule schedule_filename scheduler sync_every uid umask",
        _BEAT,
    )
    # Results.
    | _all(
        How.NATIVE,
        "result_backend result_expires result_failure_expires result_extended result_backend_transport_options",
    )
    | _all(How.CELERY, "result_serializer result_compression result_persistent", _TRACED)
    | _all(
        How.NATIVE,
        "redis_host redis_port redis_db redis_username redis_password redis_backend_use_ssl redis_socket_timeout "
        "redis_socket_connect_timeout redis_backend_health_check_interval",
    )
    | _all(
        How.MEANINGLESS,
        "redis_max_connections redis_retry_on_timeout redis_socket_keepalive",
        "the worker writes results over one connection of its own, which it renews; the child's are Celery's own",
    )
    | _all(How.CELERY, "redis_client_name redis_backend_credential_provider", _STORE)
    | _all(
        How.MEANINGLESS,
        "result_backend_always_retry result_backend_max_retries result_backend_base_sleep_between_retries_ms "
        "result_backend_max_sleep_between_retries_ms",
        "the worker keeps a result until it is stored; stores written in the child follow Celery's own code",
    )
    | _all(
        How.CELERY,
        "result_accept_content result_cache_max result_backend_thread_safe task_remote_tracebacks",
        "read by who asks for results",
    )
    | _all(How.CELERY, "result_chord_expires result_chord_join_timeout result_chord_retry_interval", _CHORD)
    | _all(How.CELERY, "task_allow_error_cb_on_chord_header", _CHORD)
    | _all(How.MEANINGLESS, "result_exchange result_exchange_type", "left over from a result store that is gone")
    # Security.
    | _prefixed(
        "security",
        How.CELERY,
        "cert_store certificate digest key key_password",
        "signed messages are read and written by Celery's own code in the child",
    )
    # Tasks: attributes of each task.
    | _all(
        How.NATIVE,
        "task_acks_late task_acks_on_failure task_acks_on_failure_or_timeout task_acks_on_timeout task_annotations "
        "task_default_rate_limit task_ignore_result task_reject_on_worker_lost task_retry_on_worker_lost "
        "task_store_errors_even_if_ignored task_track_started",
        _TASK,
    )
    # Tasks: limits and queues.
    | _all(How.NATIVE, "task_time_limit task_soft_time_limit")
    | _all(
        How.NATIVE,
        "task_queues task_default_queue task_create_missing_queues task_create_missing_queue_type "
        "task_create_missing_queue_exchange_type task_queue_max_priority",
    )
    | _all(
        How.NATIVE,
        "task_default_queue_type task_default_exchange task_default_exchange_type task_default_routing_key",
        _QUEUES,
    )
    # Tasks: sending, which also a running task does.
    | _all(
        How.CELERY,
        "task_always_eager task_compression task_default_delivery_mode task_default_priority task_eager_propagates "
        "task_protocol task_publish_retry task_publish_retry_policy task_repr_maxlevels task_routes task_serializer "
        "task_store_eager_result",
        _SENDING,
    )
    | {"task_inherit_parent_priority": Entry(How.CELERY, "follow-ups are sent by Celery's own tracer")}
    # Worker.
    | _all(
        How.NATIVE,
        "worker_concurrency worker_prefetch_multiplier worker_max_tasks_per_child worker_max_memory_per_child "
        "worker_direct worker_disable_rate_limits worker_hijack_root_logger worker_log_color worker_log_format "
        "worker_task_log_format worker_log_datefmt worker_task_log_datefmt worker_redirect_stdouts "
        "worker_redirect_stdouts_level worker_state_db",
    )
    | {
        "worker_pool": Entry(How.NATIVE, "there is no pool of that name", _is_pool),
        "worker_pool_start_method": Entry(How.NATIVE),
        "worker_deduplicate_successful_tasks": Entry(How.CELERY, "redelivered calls run through Celery's own tracer"),
        "worker_pool_restarts": Entry(How.NATIVE),
        "worker_agent": Entry(How.MISSING, "there is no agent"),
        "worker_autoscaler": Entry(How.MISSING, "--autoscale always uses fastq's own rule"),
        "worker_consumer": Entry(How.MISSING, "the consumer is fastq's own"),
        "worker_cancel_long_running_tasks_on_connection_loss": Entry(How.NATIVE),
        "worker_soft_shutdown_timeout": Entry(How.NATIVE),
        "worker_enable_soft_shutdown_on_idle": Entry(How.NATIVE, "what waits for its time is given back at once"),
        "worker_eta_task_limit": Entry(How.NATIVE, "and what it receives beside that"),
        "worker_detect_quorum_queues": Entry(How.MEANINGLESS, "the prefetch limit is never global, so any queue works"),
        "worker_disable_prefetch": Entry(How.NATIVE, "only with Redis, as in Celery"),
        "worker_enable_prefetch_count_reduction": Entry(
            How.MEANINGLESS, "after a reconnect messages wait in the worker for a free child, not in its children"
        ),
        "worker_lost_wait": Entry(How.MEANINGLESS, "a child's outcome is in shared memory: it survives the child"),
        "worker_pool_putlocks": Entry(How.MEANINGLESS, "the pool has no such lock"),
        "worker_proc_alive_timeout": Entry(
            How.NATIVE, "a child that is not ready by then is killed; 300 s when nobody sets it"
        ),
        "worker_timer": Entry(How.MEANINGLESS, "the event loop has timers of its own"),
        "worker_timer_precision": Entry(How.MEANINGLESS, "timers fire when they are due"),
    }
    | _prefixed("worker", How.NATIVE, "executable gid logfile pidfile uid umask", _OPTION)
)

#: What a setting that Celery reads without a default of its own has when nobody sets it.
_UNSET = {"result_backend_thread_safe": False}


def default_of(name: str) -> Any:
    """Return Celery's default of a setting."""
    return DEFAULTS.get(name, _UNSET.get(name))


def is_asked_for(app: celery.Celery, name: str) -> bool:
    """Whether the application gives a setting another value than Celery's default."""
    value = app.conf.get(name, default_of(name))
    return value is not None and value != default_of(name)


def not_carried(app: celery.Celery) -> Iterator[tuple[str, str]]:
    """Yield (name, why) of each setting that the application sets and that fastq's worker does not do."""
    for name, entry in sorted(CARRIED.items()):
        if entry.how is not How.MISSING and entry.accepts is None:
            continue
        if is_asked_for(app, name) and not (entry.accepts and entry.accepts(app.conf[name])):
            yield name, entry.note


def pool_of(app: celery.Celery) -> str:
    """Return the pool that the settings name; the default one where that is not carried, which a warning says."""
    return pool_name(app.conf.worker_pool) or "prefork"


def warnings_of(app: celery.Celery) -> list[str]:
    """Return what a worker says at its start: one line for each setting that it does not carry."""
    return [
        f"setting {name} = {_shown(app, name)} is not carried by this version of fastq: {why}"
        for name, why in not_carried(app)
    ]


def _shown(app: celery.Celery, name: str) -> str:
    text = repr(app.conf[name])
    return text if len(text) <= 60 else text[:57] + "..."
