"""A Celery application as the commands use it: send a call, read a result, empty queues. All by Celery's own code.

Errors of kombu and of the result store come out as fastq's, in one line with the remedy. Prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import celery
from celery.exceptions import ImproperlyConfigured, NotRegistered
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult
from kombu.exceptions import KombuError

from fastq.brokers import REDIS, find_broker, try_broker
from fastq.brokers.rabbitmq.url import split_url
from fastq.celery.conf.settings import backend_of, blaming, broker_url_of
from fastq.errors import ConnectionLost, FastqError, ResultTimeout, SettingsError
from fastq.net.urls import mask_url, split_urls
from fastq.states import READY_STATES


@contextmanager
def plain_errors(app: celery.Celery) -> Iterator[None]:
    """Turn what Celery and kombu raise, when a broker or a store is away or set up wrongly, into fastq's errors."""
    check_urls(app)
    try:
        yield
    except (KombuError, ConnectionError, TimeoutError) as error:
        where = mask_url(broker_url_of(app))
        raise ConnectionLost(f"{where}: {error}. Start the broker, or set broker_url to one that runs") from error
    except ImproperlyConfigured as error:
        raise SettingsError(f"the application's settings cannot be used: {error}") from error


def check_urls(app: celery.Celery) -> None:
    """Raise SettingsError for a URL that kombu would fail to read, with a part of the password in the error."""
    results = app.conf.result_backend
    for text in (broker_url_of(app), results if try_broker(str(results)) is REDIS else ""):
        for url in split_urls(text):
            split_url(url)


def check_transport(app: celery.Celery) -> None:
    """Raise SettingsError for a broker that fastq does not know, or kombu, which makes connections for users' code."""
    find_broker(broker_url_of(app))
    with blaming("broker_url"):
        app.connection_for_read().get_transport_cls()


def send(
    app: celery.Celery, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> AsyncResult:
    """Send a call by name, as the application would; return where its result will be."""
    with plain_errors(app):
        backend_of(app)
        return app.send_task(name, list(args), dict(kwargs), **options)


def queue_of(
    app: celery.Celery, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> str | None:
    """Return the queue that such a call goes to; None when an exchange decides that."""
    route = app.amqp.router.route(dict(options), name, list(args), dict(kwargs))
    if route.get("exchange"):
        return None
    queue = route.get("queue") or app.amqp.default_queue
    if isinstance(queue, str):
        queue = app.amqp.queues[queue]
    return str(queue.name) if queue.exchange is None or queue.exchange.type == "direct" else None


def meta_of(app: celery.Celery, task_id: str, task: str = "", wait_s: float | None = None) -> dict[str, Any] | None:
    """Return what the result store holds of a task, ``result`` decoded; None when it is not ready.

    ``task`` names the one whose result store is to be asked, where tasks have stores of their own.
    """
    with plain_errors(app):
        result = _result(app, task_id, task)
        if wait_s is not None:
            _wait(result, wait_s)
        return described(result)


def wait_for(app: celery.Celery, result: AsyncResult, timeout_s: float | None) -> dict[str, Any]:
    """Return the stored meta of a call that was just sent, once it is ready. Raises ResultTimeout."""
    with plain_errors(app):
        _wait(result, timeout_s)
        meta = described(result)
    if meta is None:
        raise ResultTimeout(f"task {result.id} is not ready after {timeout_s} s")
    return meta


def described(result: AsyncResult) -> dict[str, Any] | None:
    """Return a final result in the layout in which fastq's stores keep one; None when it is not ready."""
    state = result.state
    if state not in READY_STATES:
        return None
    value = result.result
    if isinstance(value, BaseException):
        value = {"exc_type": type(value).__name__, "exc_message": list(value.args)}
    return {"task_id": result.id, "status": state, "result": value, "traceback": result.traceback}


def purge(app: celery.Celery, queues: Sequence[str]) -> Iterator[int]:
    """Empty the queues one by one; yield how many messages were in each."""
    with plain_errors(app), app.connection_for_write() as connection:
        for name in queues:
            try:
                yield connection.default_channel.queue_purge(name) or 0
            except connection.channel_errors:  # there is no such queue yet
                yield 0


def known_queues(app: celery.Celery, asked: Sequence[str], excluded: Sequence[str]) -> list[str]:
    """Return the queues to empty: those asked for, else all of the application; raises SettingsError when none is."""
    app.loader.import_default_modules()
    names = sorted({*(asked or app.amqp.queues)} - {*excluded})
    if not names:
        raise SettingsError(f"no queue is left: -X excludes {', '.join(excluded)}. Leave one of them out of -X")
    return names


def _result(app: celery.Celery, task_id: str, task: str) -> AsyncResult:
    if not task:
        return app.AsyncResult(task_id)
    app.loader.import_default_modules()
    try:
        return app.tasks[task].AsyncResult(task_id)
    except NotRegistered as error:
        raise SettingsError(f"task {task!r} is not registered; name one of the application's tasks with -t") from error


def _wait(result: AsyncResult, timeout_s: float | None) -> None:
    try:
        result.get(timeout=timeout_s, propagate=False)
    except CeleryTimeout:
        return  # whether it is ready is seen afterwards
    except NotImplementedError as error:
        raise FastqError("the application stores no results. Give it a result_backend") from error
