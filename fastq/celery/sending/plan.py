"""What is known of an application's messages before a call: defaults, routes, where they go. Publishes nothing itself.

Celery reads most settings once, when it first publishes; the plan takes them over then. What Celery looks up for every
message (``LIVE``) is looked up for every message here too.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import celery
import celery.app.amqp
import kombu.messaging
from celery.app import routes
from celery.utils.nodenames import anon_nodename
from celery.utils.saferepr import saferepr
from kombu.exceptions import EncodeError, SerializerNotInstalled
from kombu.serialization import TRUSTED_CONTENT, prepare_accept_content, registry

from fastq.celery.conf.settings import spellings
from fastq.celery.sending import stock
from fastq.celery.sending._encode import read_setting, short_repr
from fastq.celery.sending.outlets import Outlet

#: Settings that count as they are when a message is sent, with what holds where a version of Celery lacks one.
LIVE = {
    "task_always_eager": False,
    "task_default_queue": "celery",
    "task_inherit_parent_priority": False,
    "task_repr_maxlevels": 3,
    "task_send_sent_event": False,
}

#: Arguments on which Celery's way of writing them and ours are compared before ours is used.
SAMPLES: tuple[Any, ...] = ((), (1, "it's", None, 2.5, True), ([1, (2,), {"a": [3, {}]}],), {"key": "ü", "n": {1: []}})


class Plan:
    """All of that for one ``app.amqp``. ``obstacle``: why messages have to go through Celery, "" when they need not."""

    def __init__(self, app: celery.Celery, outlet: Outlet | None, subscribe_early: bool) -> None:
        self.app = app
        self.conf = app.conf
        self.amqp = amqp = app.amqp
        self.outlet = outlet
        self.subscribe_early = subscribe_early
        self.router = amqp.router
        #: Names of tasks that have been looked at.
        self.seen_tasks: set[str] = set()
        self._functions = self._functions_now()
        self.obstacle = stock.obstacle(app) or ("" if outlet else "fastq does not publish to this broker")
        if self.obstacle:
            return
        conf = app.conf
        self.queues = amqp.queues
        self.retry: bool = conf.task_publish_retry
        self.retry_policy: dict[str, Any] = conf.task_publish_retry_policy
        self.delivery_mode: Any = conf.task_default_delivery_mode
        self.default_exchange: Any = amqp.default_exchange
        self.routing_key: str = conf.task_default_routing_key
        self.serializer: str = conf.task_serializer
        self.compression: str | None = conf.task_compression
        self._accepted: set[str] = set()
        self._keys = {name: spellings(conf, name) for name in LIVE}
        self._routes: dict[str, tuple[str, dict[str, Any]]] = {}
        #: Whether a task's name alone decides where it goes, unless its call says so.
        self.has_fixed_routes = type(self.router) is routes.Router and all(
            type(route) is routes.MapRoute for route in self.router.routes
        )
        self.writes_headers = self._agrees_on_headers()
        self.writes_text = self._agrees_on_text()

    def _functions_now(self) -> tuple[Any, ...]:
        producer, attributes = kombu.messaging.Producer, self.amqp.__dict__
        # Asking for these makes them, once.
        made = (self.amqp.send_task_message, self.amqp.create_task_message)
        return (type(self.app).send_task, producer.publish, producer._publish, *made, attributes.get("router"))

    def is_current(self) -> bool:
        """Whether the application and Celery's functions are still what they were."""
        producer = kombu.messaging.Producer
        amqp = self.app.__dict__.get("amqp")
        if amqp is not self.amqp:
            return False
        send_task, publish, put, send_message, create_message, router = self._functions
        attributes = amqp.__dict__
        return (
            type(self.app).send_task is send_task
            and producer.publish is publish
            and producer._publish is put
            and attributes.get("send_task_message") is send_message
            and attributes.get("create_task_message") is create_message
            and attributes.get("router") is router
        )

    def live(self, name: str) -> Any:
        """Return a setting as it is now."""
        return read_setting(self.conf.maps, self._keys[name], LIVE[name])

    def check_serializer(self, task: str, options: dict[str, Any]) -> None:
        """Raise kombu's EncodeError for a call in a form that the application's own workers would refuse.

        Celery sends it all the same, and whoever waits for its result is told by the worker. A task that is not the
        application's own may have workers of another configuration.
        """
        name = options.get("serializer") or self.serializer
        # `app.tasks` would finalize the application, or refuse to.
        if name in self._accepted or task not in self.app._tasks:
            return
        codec, accept = registry._encoders.get(name), self.conf.accept_content
        with contextlib.suppress(SerializerNotInstalled):
            accepted = prepare_accept_content(accept)
            if codec is not None and accepted and codec.content_type not in TRUSTED_CONTENT.union(accepted):
                raise EncodeError(
                    f"serializer {name!r}: the application's own workers would refuse a call of {task!r}, as "
                    f"accept_content is {sorted(accept)}. Add {name!r} to it, or choose another serializer"
                )
        self._accepted.add(name)

    # --- routes

    def route(self, options: dict[str, Any], name: str, args: Any, kwargs: Any, task: Any) -> dict[str, Any]:
        """Return options with the destination that Celery's router gives them; takes the given ones."""
        if not self.has_fixed_routes or options.get("queue") is not None:
            return dict(self.router.route(options, name, args, kwargs, task))
        default = self.live("task_default_queue")
        known = self._routes.get(name)
        if known is None or known[0] != default or not self.knows(known[1].get("queue")):
            # With a fixed table the destination follows from the name alone.
            base = dict(self.router.route({}, name, args, kwargs, task))
            known = self._routes[name] = default, base
        routed = known[1].copy()
        for option, value in options.items():
            if value is not None:
                routed[option] = value
        return routed

    def knows(self, queue: Any) -> bool:
        """Whether a queue is still the one that the application has under its name, if there is one at all."""
        return queue is None or dict.get(self.queues, queue.name) is queue

    def has_quorum_queues(self) -> bool:
        """Whether Celery would send delayed tasks through RabbitMQ's delay queues."""
        arguments = (queue.queue_arguments or {} for queue in self.queues.values())
        return any(each.get("x-queue-type") == "quorum" for each in arguments)

    # --- what is written

    def text_of(self, arguments: Any, max_size: int) -> str:
        """Return arguments as Celery shows them in headers."""
        levels = self.live("task_repr_maxlevels")
        text = short_repr(arguments, max_size or 0, levels or 0) if self.writes_text else None
        return text if text is not None else str(saferepr(arguments, max_size, levels))

    def _agrees_on_headers(self) -> bool:
        ours = task_headers("id", "name", "()", "{}", self.origin(), {})
        theirs = self.amqp.as_task_v2("id", "name", argsrepr="()", kwargsrepr="{}", origin=self.origin()).headers
        return list(theirs.items()) == list(ours.items())

    def _agrees_on_text(self) -> bool:
        return all(short_repr(sample, 1024, 3) == saferepr(sample, 1024) for sample in SAMPLES)

    def origin(self) -> str:
        """Return the name of this process for the ``origin`` header."""
        make = celery.app.amqp.anon_nodename
        return _origin(os.getpid()) if make is anon_nodename else str(make())


@functools.cache
def _origin(pid: int) -> str:
    return str(anon_nodename())


def task_headers(
    task_id: str, name: str, argsrepr: str, kwargsrepr: str, origin: str, given: dict[str, Any]
) -> dict[str, Any]:
    """Return the headers of a task that is neither delayed nor expires; ``given`` are other arguments of the call."""
    get = given.get
    return {
        "lang": "py",
        "task": name,
        "id": task_id,
        "shadow": get("shadow"),
        "eta": None,
        "expires": None,
        "group": get("group_id"),
        "group_index": get("group_index"),
        "retries": get("retries", 0),
        "timelimit": [get("time_limit"), get("soft_time_limit")],
        "root_id": get("root_id") or task_id,
        "parent_id": get("parent_id"),
        "argsrepr": argsrepr,
        "kwargsrepr": kwargsrepr,
        "origin": origin,
        "ignore_result": get("ignore_result", False),
        "replaced_task_nesting": get("replaced_task_nesting", 0),
        "stamped_headers": None,
        "stamps": {},
    }
