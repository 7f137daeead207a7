"""What fastq's worker will make of a Celery application: each task's path, and settings to look at. Sends nothing."""

from __future__ import annotations

import contextlib
import difflib
import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import celery
from celery.app.defaults import _TO_NEW_KEY, NAMESPACES, flatten
from celery.utils.collections import DictAttribute

from fastq.brokers import REDIS, try_broker, unknown_options
from fastq.celery.checking.hookpoints import touched
from fastq.celery.checking.report import NOTE, RISK, Finding, Report, TaskPath
from fastq.celery.cli.client import check_transport, check_urls
from fastq.celery.conf.carried import CARRIED, not_carried
from fastq.celery.conf.settings import backend_of, broker_url_of, own_store, result_backend_of, settings_of_app
from fastq.errors import SettingsError
from fastq.net.urls import mask_url, split_urls
from fastq.settings import Settings

#: How alike two names are when one is taken for a slip of the other; by trial with swapped and missing letters.
_LIKENESS = 0.8

#: First words of Celery's settings: in a module with other things, only such names are looked at.
_FIRST_WORDS = (
    "accept_",
    "beat_",
    "broker_",
    "control_",
    "event_",
    "redis_",
    "result_",
    "security_",
    "task_",
    "worker_",
)
_OLD_FIRST_WORDS = ("CELERY_", "CELERYD_", "CELERYBEAT_", "BROKER_")

_INSIDE = (".local", ".internal", ".lan", ".svc", ".home", ".localhost", ".localdomain")
_PICKLE = {"pickle", "application/x-python-serialize"}
#: kombu's value for Redis when none is given, in seconds.
_VISIBILITY_TIMEOUT_S = 3600.0


def check(app: celery.Celery) -> Report:
    """Return the report on an application whose task modules have been imported.

    Raises SettingsError when its result store cannot be made.
    """
    app.finalize()
    backend_of(app)  # without one no worker starts, and no task can be judged
    own = [task for name, task in sorted(app.tasks.items()) if not name.startswith("celery.")]
    return Report(
        application=f"{app.main or 'unnamed'} (Celery {celery.__version__})",
        broker=mask_url(broker_url_of(app)),
        results=_results_of(app),
        tasks=[TaskPath(task.name, tuple(touched(task, app))) for task in own],
        findings=[
            *_unusable(app),
            *unknown_settings(app),
            *_unknown_options(app),
            *_missing(app),
            *_steps(app),
            *_risks(app, own),
        ],
    )


def _results_of(app: celery.Celery) -> str:
    kind = own_store(app.backend)
    if kind in ("disabled", "redis"):
        return mask_url(result_backend_of(app))
    return mask_url(str(app.backend.as_uri(include_password=False)))


def _unusable(app: celery.Celery) -> Iterator[Finding]:
    """Yield the setting whose value the worker would refuse."""
    try:
        settings_of_app(app).freeze()
        check_urls(app)
        check_transport(app)
    except SettingsError as error:
        named = re.match(r"setting '(\w+)'", str(error))
        yield Finding("unusable", named[1] if named else "settings", str(error))


def _missing(app: celery.Celery) -> Iterator[Finding]:
    for name, why in not_carried(app):
        yield Finding("not carried", name, why)


def _unknown_options(app: celery.Celery) -> Iterator[Finding]:
    with contextlib.suppress(SettingsError):  # named elsewhere
        yield from (Finding("unknown", name, text) for name, text in unknown_options(settings_of_app(app)))


def _steps(app: celery.Celery) -> Iterator[Finding]:
    for blueprint, steps in sorted(app.steps.items()):
        for step in sorted(map(_name_of, steps)):
            why = f"{step} runs in a thread of its own; steps of Celery's that it requires count as started"
            yield Finding(NOTE, f"app.steps[{blueprint!r}]", why)


def _name_of(step: Any) -> str:
    return step if isinstance(step, str) else str(step.name)


# --- names that nobody knows ------------------------------------------------------------------------------------------


def unknown_settings(app: celery.Celery) -> Iterator[Finding]:
    """Yield the settings that neither Celery nor fastq knows: a slip when a known name is much alike, else a note."""
    prefix = app.namespace.upper().rstrip("_") + "_" if app.namespace else ""
    seen = set()
    for source in app.conf.finalize().maps[:-1]:
        for key in _keys(source, prefix):
            name = key[len(prefix) :].lower() if prefix and key.startswith(prefix) else key
            if key not in seen and name not in _known() and not {key, name.upper()} & _TO_NEW_KEY.keys():
                seen.add(key)
                yield from _judged(key, name, prefix)


def _keys(source: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yield the keys of a source of configuration that are meant for Celery."""
    if prefix:
        meant: tuple[str, ...] = (prefix, *_FIRST_WORDS, "fastq_")
    elif isinstance(source, DictAttribute):
        meant = (*_FIRST_WORDS, *_OLD_FIRST_WORDS, "fastq_")
    else:
        meant = ("",)  # a dict is all configuration
    yield from (key for key in source if key[:1] != "_" and key.startswith(meant))


def _judged(key: str, name: str, prefix: str) -> Iterator[Finding]:
    is_old = not prefix and key.isupper()
    near = difflib.get_close_matches(name, _TO_NEW_KEY if is_old else _known(), 1, _LIKENESS)
    if near:
        # The same spelling as the slip.
        right = prefix + near[0].upper() if prefix and key.startswith(prefix) else near[0]
        yield Finding("unknown", key, f"no setting has this name; did you mean {right}?")
    elif prefix or name.startswith((*_FIRST_WORDS, "fastq_")):
        yield Finding(NOTE, key, "neither Celery nor fastq knows it; another package may")


@cache
def _known() -> frozenset[str]:
    own = (name for name in Settings.__annotations__ if name.startswith("fastq_"))
    return frozenset(CARRIED) | {name for name, _ in flatten(NAMESPACES)} | set(own) | {"deprecated_settings"}


# --- settings that are known to hurt ----------------------------------------------------------------------------------


def _risks(app: celery.Celery, tasks: list[Any]) -> Iterator[Finding]:
    yield from (Finding(RISK, name, text) for name, text in _time_risks(app, tasks))
    yield from (Finding(RISK, name, text) for name, text in _loss_risks(app, tasks))
    yield from (Finding(RISK, name, text) for name, text in _exposure_risks(app))
    yield from (Finding(NOTE, name, text) for name, text in _notes(app))


def _time_risks(app: celery.Celery, tasks: list[Any]) -> Iterator[tuple[str, str]]:
    conf = app.conf
    limits = {task.name: float(task.time_limit or conf.task_time_limit or 0) for task in tasks}
    timeout = float((conf.broker_transport_options or {}).get("visibility_timeout", _VISIBILITY_TIMEOUT_S))
    late = {task.name: limits[task.name] for task in tasks if task.acks_late}
    slow = [name for name, limit in late.items() if limit > timeout]
    if try_broker(broker_url_of(app)) is REDIS and slow:
        yield (
            "visibility_timeout",
            f"{timeout:g} s is less than the time limit of {_some(slow)}: a Celery worker on the same broker gives "
            "such a message to another worker while it still runs",
        )


def _loss_risks(app: celery.Celery, tasks: list[Any]) -> Iterator[tuple[str, str]]:
    conf = app.conf
    dropped = [task.name for task in tasks if task.acks_late and not task.reject_on_worker_lost]
    if dropped and not conf.get("fastq_reliable"):
        yield (
            "task_reject_on_worker_lost",
            f"{_some(dropped)}: acks_late, yet the call ends as a failure when its process dies; "
            "task_reject_on_worker_lost runs it again, and so does fastq_reliable, with a bound",
        )
    if conf.task_always_eager:
        yield "task_always_eager", "no message is sent: tasks run where they are called, and a worker has nothing to do"
    for name, option in flatten(NAMESPACES):
        value = conf.get(name)
        if option.type == "bool" and isinstance(value, str) and value.lower() in ("false", "no", "off", "0"):
            yield name, f"{value!r} is a text and counts as True; write False"


def _exposure_risks(app: celery.Celery) -> Iterator[tuple[str, str]]:
    conf = app.conf
    if _PICKLE & set(conf.accept_content or ()):
        yield "accept_content", "pickle is accepted: who may write to the broker may run code in the worker"
    for name, text in (("broker_url", broker_url_of(app)), ("result_backend", str(conf.result_backend or ""))):
        is_encrypted = bool(conf.broker_use_ssl if name == "broker_url" else conf.redis_backend_use_ssl)
        hosts = [] if is_encrypted else list(_open_passwords(text))
        if hosts:
            yield (
                name,
                f"the password for {', '.join(hosts)} crosses the network unencrypted; use amqps:// or rediss://",
            )


def _open_passwords(urls: str) -> Iterator[str]:
    """Yield the hosts to which a password is sent without TLS, those on private networks excepted."""
    for url in split_urls(urls):
        parts = urlsplit(url)
        broker = try_broker(url)
        is_open = broker is not None and broker.ports and parts.scheme not in broker.tls_schemes
        if is_open and parts.password and _is_remote(parts.hostname):
            yield str(parts.hostname)


def _is_remote(host: str | None) -> bool:
    """Whether a host stands on the open network: no private address, and no name of an inner network."""
    if not host:
        return False
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        # One word is a service or a machine beside this one.
        return "." in host.strip(".") and not host.endswith(_INSIDE)


def _notes(app: celery.Celery) -> Iterator[tuple[str, str]]:
    conf, kind = app.conf, own_store(app.backend)
    if kind == "rpc":
        yield "result_backend", "with rpc:// only the process that sent a task gets its result"
    if kind == "redis" and not conf.result_expires:
        yield "result_expires", "results are kept for ever; Redis fills up unless somebody forgets them"
    if not conf.broker_pool_limit:
        yield "broker_pool_limit", "each message that is sent opens a connection of its own"


def _some(names: Iterable[str]) -> str:
    """Return the first names and how many more there are."""
    first = sorted(names)
    rest = len(first) - 3
    return ", ".join(first[:3]) + (f" and {rest} more" if rest > 0 else "")
