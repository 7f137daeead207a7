"""A task's message before it is sent: headers, body, where it goes and how. Nothing is published here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from kombu.common import Broadcast
from kombu.entity import maybe_delivery_mode
from kombu.utils.functional import maybe_list

from fastq.celery.sending._encode import PropertiesTemplate, task_properties
from fastq.celery.sending.body import encode_body
from fastq.celery.sending.plan import Plan, task_headers
from fastq.celery.sending.tasks import Defaults
from fastq.errors import EncodeError
from fastq.wire.message import Message

#: Options that say where and how a message is sent; the others that are known here say what it is.
ROUTE_OPTIONS = (
    *("queue", "exchange", "routing_key", "priority", "delivery_mode", "serializer", "compression"),
    *("headers", "retry", "retry_policy", "immediate", "mandatory"),
)
#: Options that, with what a task says of itself, are arguments of ``as_task_v2`` under the same names.
MESSAGE_OPTIONS = (
    *("shadow", "group_id", "group_index", "retries", "root_id", "parent_id", "replaced_task_nesting"),
    *("countdown", "eta", "expires", "time_limit", "soft_time_limit", "ignore_result"),
)
#: What a destination may hold in the end; a route of the application may say more, which is Celery's to understand.
ROUTED = frozenset((*ROUTE_OPTIONS, "expiration"))
#: Properties that the compiled encoder writes; a handler of before_task_publish may add others.
PROPERTIES = frozenset({"correlation_id", "reply_to", "priority", "expiration", "immediate", "mandatory"})
#: The third part of a body when nothing follows a task.
FOLLOW_UPS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def make_message(plan: Plan, task_id: str, name: str, args: Any, kwargs: Any, call: dict[str, Any]) -> Any:
    """Return (headers, properties, body, None) as Celery's ``as_task_v2``, which does it when dates are involved."""
    amqp, get = plan.amqp, call.get
    argsrepr = plan.text_of(args, amqp.argsrepr_maxsize)
    kwargsrepr = plan.text_of(kwargs, amqp.kwargsrepr_maxsize)
    follow_ups = {
        "callbacks": maybe_list(get("link")),
        "errbacks": maybe_list(get("link_error")),
        "chain": get("chain"),
        "chord": get("chord"),
    }
    reply_to = get("reply_to") or plan.app.thread_oid
    if plan.writes_headers and not get("countdown") and get("eta") is None and get("expires") is None:
        headers = task_headers(task_id, name, argsrepr, kwargsrepr, plan.origin(), call)
        return headers, {"correlation_id": task_id, "reply_to": reply_to or ""}, (args, kwargs, follow_ups), None
    given = {option: call[option] for option in MESSAGE_OPTIONS if option in call}
    return amqp.as_task_v2(
        task_id, name, args, kwargs, reply_to=reply_to, argsrepr=argsrepr, kwargsrepr=kwargsrepr, **follow_ups, **given
    )


def task_message(
    exchange: str,
    routing_key: str,
    content_type: str,
    content_encoding: str,
    delivery_mode: int,
    headers: dict[str, Any],
    properties: dict[str, Any],
    body: bytes,
) -> Message:
    """Return a message as py-amqp would send it; ``properties`` are named as in kombu. Raises EncodeError."""
    priority = properties.get("priority", 0)
    props = task_properties(
        content_type,
        content_encoding,
        headers,
        delivery_mode,
        priority,
        properties["correlation_id"],
        properties["reply_to"],
        lifetime(properties),
    )
    return Message(exchange, routing_key, props, body, properties["correlation_id"], priority or 0)


def lifetime(properties: dict[str, Any]) -> str | None:
    """Return a message's expiration in milliseconds, as brokers want it."""
    seconds = properties.get("expiration")
    return None if seconds is None else str(int(seconds * 1000))


def declarations(queue: Any) -> list[Any] | None:
    """Return what has to be declared before a message to a queue."""
    return [queue] if queue and not isinstance(queue, Broadcast) else None


def publish_options(plan: Plan, queue: Any, routed: dict[str, Any]) -> dict[str, Any]:
    """Return how a message is published, out of its options and the settings."""
    take = routed.pop
    retry = take("retry", None)
    return {
        "serializer": take("serializer", None) or plan.serializer,
        "compression": take("compression", None) or plan.compression,
        "delivery_mode": delivery_mode(plan, queue, take("delivery_mode", None)),
        "retry": plan.retry if retry is None else retry,
        "retry_policy": {**plan.retry_policy, **(take("retry_policy", None) or {})},
    }


def delivery_mode(plan: Plan, queue: Any, given: Any) -> Any:
    """Return whether a message is to survive the broker's restart: what the call, the exchange or the setting says."""
    if given is not None:
        return given
    return getattr(getattr(queue, "exchange", None), "delivery_mode", None) or plan.delivery_mode


def destination(plan: Plan, take: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """Return exchange, routing key and queue for options that the router has seen: Celery's rules."""
    queue, exchange, routing_key = take("queue", None), take("exchange", None), take("routing_key", None)
    name = queue
    if queue is None and exchange is None:
        queue = plan.amqp.default_queue
    if isinstance(queue, str):
        queue = plan.queues[queue]
    elif queue is not None:
        name = queue.name
    is_direct = queue is None or getattr(queue.exchange, "type", "direct") == "direct"
    if is_direct and not (exchange and routing_key):
        return "", name, queue
    if exchange is None:
        exchange = queue.exchange.name or plan.default_exchange
        routing_key = routing_key or queue.routing_key or plan.routing_key
    return exchange, routing_key, queue


class Shape:
    """A task's message without what differs from call to call; not ``is_whole`` where more than that may differ."""

    def __init__(self, plan: Plan, task: Any, defaults: Defaults) -> None:
        self.plan = plan
        self.default_queue = plan.live("task_default_queue")
        self.queue: Any = None
        self.is_whole = plan.has_fixed_routes and plan.writes_headers and defaults.call.get("expires") is None
        if not self.is_whole:
            return
        routed = plan.route(defaults.options.copy(), task.name, (), {}, task)
        plan.check_serializer(task.name, routed)
        self.is_whole = ROUTED.issuperset(routed) and not routed.get("headers")
        self.exchange, self.routing_key, self.queue = destination(plan, routed.pop)
        self.declare = tuple(declarations(self.queue) or ())
        self.how = publish_options(plan, self.queue, routed)
        self.properties = routed
        self._headers = task_headers("", task.name, "()", "{}", "", defaults.call)
        self.ignores_result = self._headers["ignore_result"]
        self.priority: int = 0
        self.content: tuple[str, str] = ("", "")
        #: Writes the properties of a call; None where kombu has to.
        self.template: PropertiesTemplate | None = None
        with contextlib.suppress(EncodeError, TypeError):
            self.template = self._make_template(plan)

    def headers_of(self, task_id: str, argsrepr: str, kwargsrepr: str, origin: str) -> dict[str, Any]:
        """Return the headers of one call."""
        given = self._headers
        own = {"id": task_id, "root_id": task_id, "timelimit": given["timelimit"][:], "stamps": {}}
        return {**given, **own, "argsrepr": argsrepr, "kwargsrepr": kwargsrepr, "origin": origin}

    def _make_template(self, plan: Plan) -> PropertiesTemplate | None:
        assert plan.outlet is not None
        is_known = PROPERTIES.issuperset(self.properties) and not self.how["compression"]
        if not is_known or (self.exchange and not plan.outlet.takes_exchanges):
            return None
        content_type, encoding, _ = encode_body(((), {}, FOLLOW_UPS), self.how["serializer"], None, {})
        self.content = content_type, encoding
        priority = self.properties.get("priority", 0)
        self.priority = priority or 0
        mode = maybe_delivery_mode(self.how["delivery_mode"])
        expiration = lifetime(self.properties)
        return PropertiesTemplate(content_type, encoding, self._headers, mode, priority, expiration)

    def fits(self, plan: Plan) -> bool:
        """Whether it still says where the task's messages go."""
        if self.plan is not plan or self.default_queue != plan.live("task_default_queue"):
            return False
        return plan.knows(self.queue)
