"""``app.send_task`` on fastq's connections: the same message, signals and result as Celery's, in a tenth of its time.

The message is made here and sent over an outlet. What is not plain goes to Celery's own ``send_task`` before anything
has been done; what the outlet cannot send goes to kombu's producer, which retries and raises as the application
expects.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import celery
import celery.app.amqp
import celery.app.base
import celery.backends.base
from celery import signals
from celery._state import _task_stack, get_current_worker_task, task_join_will_block
from kombu.entity import maybe_delivery_mode
from kombu.exceptions import OperationalError
from kombu.utils.uuid import uuid as UUID  # noqa: N812  what makes Celery's ids

from fastq.celery.running._request import faster
from fastq.celery.sending.body import encode_body
from fastq.celery.sending.message import (
    FOLLOW_UPS,
    MESSAGE_OPTIONS,
    PROPERTIES,
    ROUTE_OPTIONS,
    ROUTED,
    Shape,
    declarations,
    destination,
    make_message,
    publish_options,
    task_message,
)
from fastq.celery.sending.outlets import open_outlet
from fastq.celery.sending.plan import Plan
from fastq.celery.sending.stock import is_own
from fastq.celery.sending.tasks import Defaults, adopt
from fastq.errors import EncodeError, FastqError, PublishError
from fastq.net import forks
from fastq.wire.ids import new_uuid4
from fastq.wire.message import Message

logger = logging.getLogger("fastq.celery.publishing.sender")

#: Options that are text or None.
TEXTS = ("task_id", "reply_to", "exchange", "routing_key")
#: Options that have to be absent or None.
ABSENT = ("producer", "publisher", "connection", "router", "immediate", "mandatory")
KNOWN = frozenset(
    (
        *(*ROUTE_OPTIONS, *MESSAGE_OPTIONS, *ABSENT),
        *("link", "link_error", "chain", "chord", "reply_to"),
        *("task_id", "task_type", "result_cls", "add_to_parent", "route_name"),
    )
)

#: Chosen: after a message could not be sent, kombu has the next ones for so long: it knows how to wait.
REST_S = 1.0

#: What a result store wants to be there before a call: nothing, a queue for replies, a subscription, a producer.
NOTHING, REPLY_QUEUE, SUBSCRIPTION, PRODUCER = range(4)

#: Whether this Celery takes over what a registered task says of itself when it is sent by its name.
LOOKS_UP_TASKS = "resolved_from_registry" in inspect.unwrap(celery.app.base.Celery.send_task).__code__.co_varnames
#: What the header says when a call by name does not say whether its result is ignored.
NOT_SAID = None if celery.VERSION[:2] >= (5, 7) else False
#: Set while a worker publishes callbacks with retries of its own.
CALLBACK_RETRY: Any = getattr(celery.app.amqp, "_callback_publish_retry", None)
#: The tasks that run in this thread, those within others included.
RUNNING = faster(_task_stack)


class Sender:
    """The publish path of one application."""

    def __init__(self, app: celery.Celery, subscribe_early: bool = False, confirm_behind: bool = False) -> None:
        self._app = app
        self._subscribe_early = subscribe_early
        self._confirm_behind = confirm_behind
        self._plan: Plan | None = None
        self._lock = threading.Lock()
        self._rests_until = 0.0
        forks.register(self)

    def close(self) -> None:
        """Close the connection; the next message opens a new one."""
        with self._lock:
            plan, self._plan = self._plan, None
        if plan is not None and plan.outlet is not None:
            plan.outlet.close()

    def after_fork(self) -> None:
        """In a forked child: another thread of the parent may have held the lock, and results are the parent's."""
        self._lock = threading.Lock()
        leave_results(self._app)

    def send_task(self, name: str, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any) -> Any:
        """Send a task by its name, as Celery's ``send_task``. Returns its AsyncResult."""
        plan = self._current_plan()
        task, call = options.get("task_type"), options
        if task is not None:
            if task.name not in plan.seen_tasks:
                self._look_at(plan, task)
        elif LOOKS_UP_TASKS:
            call = {**options_of(self._app._tasks.get(name)), **options}
        if rest or plan.obstacle or not is_plain(plan, args, kwargs, call) or waits_for_celery(plan):
            return type(self._app).send_task(self._app, name, args, kwargs, *rest, **options)
        call = call.copy()
        split = {option: call.pop(option) for option in ROUTE_OPTIONS if option in call}
        return self._send(plan, name, args or (), kwargs or {}, call, split)

    def send_plain(self, task: Any, args: Any, kwargs: Any, task_id: str | None, defaults: Defaults) -> Any:
        """Send a task with arguments alone. Returns its AsyncResult, or NotImplemented: Celery has to make the call."""
        plan = self._current_plan()
        if plan.obstacle or waits_for_celery(plan) or task._get_app() is not self._app:
            return NotImplemented
        if not are_arguments(args, kwargs) or not (task_id is None or type(task_id) is str):
            return NotImplemented
        parent = get_current_worker_task() if RUNNING else None
        if not parent and not watched():
            shape = defaults.shape
            if shape is None or not shape.fits(plan):
                shape = defaults.shape = Shape(plan, task, defaults)
            if shape.is_whole:
                return self._send_shaped(plan, shape, task, args or (), kwargs or {}, task_id or new_task_id())
        call = defaults.call.copy()
        call["task_id"], call["task_type"], call["result_cls"] = task_id, task, task.AsyncResult
        return self._send(plan, task.name, args or (), kwargs or {}, call, defaults.options.copy())

    def _look_at(self, plan: Plan, task: Any) -> None:
        """Give a task the short way for its plain calls, if it has plain ones."""
        plan.seen_tasks.add(task.name)
        if not plan.obstacle and is_plain(plan, (), {}, dict(task._get_exec_options())):
            adopt(task, self.send_plain, ROUTE_OPTIONS)

    def _current_plan(self) -> Plan:
        plan = self._plan
        return plan if plan is not None and plan.is_current() else self._make_plan()

    def _make_plan(self) -> Plan:
        with self._lock:
            plan = self._plan
            if plan is None or not plan.is_current():
                outlet = plan.outlet if plan is not None else open_outlet(self._app, self._confirm_behind)
                plan = self._plan = Plan(self._app, outlet, self._subscribe_early)
                logger.debug("%r publishes through %s", self._app, plan.obstacle or outlet)
            return plan

    def _send(
        self, plan: Plan, name: str, args: Any, kwargs: Any, call: dict[str, Any], options: dict[str, Any]
    ) -> Any:
        app, take = self._app, call.pop
        ignores_result = call.setdefault("ignore_result", NOT_SAID)
        task_id = take("task_id", None) or new_task_id()
        result_cls, add_to_parent = take("result_cls", None), take("add_to_parent", True)
        routed = plan.route(options, call.get("route_name") or name, args, kwargs, call.get("task_type"))
        if (expires := call.get("expires")) is not None:
            routed["expiration"] = expires
        plan.check_serializer(name, routed)
        parent = get_current_worker_task() if RUNNING else None
        if parent:
            inherit(plan, call, routed, parent.request)
        message = make_message(plan, task_id, name, args, kwargs, call)
        if not ignores_result:
            announce(plan, task_id)
        self._publish(plan, name, message, routed)
        result = (result_cls or app.AsyncResult)(task_id)
        result.ignored = ignores_result
        if parent and add_to_parent:
            parent.add_trail(result)
        return result

    def _send_shaped(self, plan: Plan, shape: Shape, task: Any, args: Any, kwargs: Any, task_id: str) -> Any:
        """Send a call that differs from others of its task only in its arguments and id."""
        amqp = plan.amqp
        argsrepr = plan.text_of(args, amqp.argsrepr_maxsize)
        kwargsrepr = plan.text_of(kwargs, amqp.kwargsrepr_maxsize) if kwargs else "{}"
        ignores_result = shape.ignores_result
        if not ignores_result:
            announce(plan, task_id)
        body = (args, kwargs, FOLLOW_UPS)
        if not self._sends_shaped(plan, shape, task_id, argsrepr, kwargsrepr, body):
            headers = shape.headers_of(task_id, argsrepr, kwargsrepr, plan.origin())
            properties = {"correlation_id": task_id, "reply_to": plan.app.thread_oid, **shape.properties}
            how = {**shape.how, "retry_policy": dict(plan.retry_policy)}
            hand_over(plan.app, body, shape.exchange, shape.routing_key, list(shape.declare), headers, properties, how)
        result = task.AsyncResult(task_id)
        result.ignored = ignores_result
        return result

    def _sends_shaped(self, plan: Plan, shape: Shape, task_id: str, argsrepr: str, kwargsrepr: str, body: Any) -> bool:
        """Whether the outlet has sent a call of this shape; False when it is for kombu."""
        template = shape.template
        if template is None or self._rests():
            return False
        content_type, encoding, data = encode_body(body, shape.how["serializer"], None, {})
        if (content_type, encoding) != shape.content:
            return False
        try:
            props = template.fill(task_id, argsrepr, kwargsrepr, plan.origin(), plan.app.thread_oid)
            message = Message(shape.exchange, shape.routing_key, props, data, task_id, shape.priority)
        except (EncodeError, TypeError) as error:
            logger.debug("kombu sends task %s: %s", task_id, error)
            return False
        return self._goes_out(plan, message, shape.declare)

    def _publish(self, plan: Plan, name: str, message: Any, routed: dict[str, Any]) -> None:
        if not ROUTED.issuperset(routed) or routed.get("immediate") or routed.get("mandatory"):
            with acquired(self._app) as producer:
                plan.amqp.send_task_message(producer, name, message, **routed)
            return
        headers, properties, body, _ = message
        take = routed.pop
        if more_headers := take("headers", None):
            headers.update(more_headers)
        exchange, routing_key, queue = destination(plan, take)
        declare = declarations(queue)
        how = publish_options(plan, queue, routed)
        properties.update(routed)
        if signals.before_task_publish.receivers:
            signals.before_task_publish.send(
                sender=name,
                body=body,
                exchange=exchange,
                routing_key=routing_key,
                declare=declare,
                headers=headers,
                properties=properties,
                retry_policy=how["retry_policy"],
            )
        if not self._sends(plan, exchange, routing_key, declare or (), headers, properties, body, how):
            hand_over(self._app, body, exchange, routing_key, declare, headers, properties, how)
        if signals.after_task_publish.receivers:
            signals.after_task_publish.send(
                sender=name, body=body, headers=headers, exchange=exchange, routing_key=routing_key
            )
        if signals.task_sent.receivers:
            signals.task_sent.send(
                sender=name,
                task_id=headers["id"],
                task=name,
                args=body[0],
                kwargs=body[1],
                eta=headers["eta"],
                taskset=headers["group"],
            )

    def _sends(
        self,
        plan: Plan,
        exchange: Any,
        routing_key: Any,
        declare: Any,
        headers: dict[str, Any],
        properties: dict[str, Any],
        body: Any,
        how: dict[str, Any],
    ) -> bool:
        """Whether the outlet has sent a message; False when it is for kombu."""
        outlet = plan.outlet
        assert outlet is not None
        if (exchange and not outlet.takes_exchanges) or not PROPERTIES.issuperset(properties) or self._rests():
            return False
        content_type, encoding, data = encode_body(body, how["serializer"], how["compression"], headers)
        mode = maybe_delivery_mode(how["delivery_mode"])
        try:
            message = task_message(exchange, routing_key, content_type, encoding, mode, headers, properties, data)
        except (EncodeError, TypeError, KeyError) as error:
            logger.debug("kombu sends task %s: %s", headers.get("id"), error)
            return False
        return self._goes_out(plan, message, declare)

    def _rests(self) -> bool:
        """Whether a message could not be sent a moment ago; the next ones are kombu's before they are written here."""
        return bool(self._rests_until) and time.monotonic() < self._rests_until

    def _goes_out(self, plan: Plan, message: Message, declare: Any) -> bool:
        """Whether the outlet has sent a message; after a failure kombu has it, and all others for a while."""
        assert plan.outlet is not None
        try:
            plan.outlet.send(message, declare)
        except FastqError as error:
            if isinstance(error, PublishError) and error.again is not None and not error.again:
                # It may still arrive: not once more by kombu.
                raise OperationalError(str(error)) from error
            logger.debug("kombu sends task %s: %s", message.id, error)
            if not isinstance(error, EncodeError):
                self._rests_until = time.monotonic() + REST_S
            return False
        self._rests_until = 0.0
        return True


#: What a forked child has left to its parent; to collect it would close the parent's connection.
INHERITED: list[Any] = []


def leave_results(app: Any) -> None:
    """In a forked child: what waits for results is made anew. On the parent's connection each would take the other's.

    Celery does the same after a fork by multiprocessing, but not after a plain one.
    """
    vars(app._local).pop("oid", None)  # the reply queue of rpc:// is named after it
    backend = getattr(app, "_backend_cache", None) or getattr(app._local, "backend", None)
    consumer = getattr(backend, "result_consumer", None)
    if backend is not None and consumer is not None:
        INHERITED.append(consumer)
        backend.result_consumer = backend.ResultConsumer(
            backend, backend.app, backend.accept, backend._pending_results, backend._pending_messages
        )


def is_plain(plan: Plan, args: Any, kwargs: Any, options: dict[str, Any]) -> bool:
    """Whether a call is one of those that are made here; all of Celery's other ways are left to Celery."""
    if not KNOWN.issuperset(options):
        return False
    get = options.get
    for name in ABSENT:
        if get(name) is not None:
            return False
    for name in TEXTS:
        if (value := get(name)) is not None and type(value) is not str:
            return False
    if not are_arguments(args, kwargs):
        return False
    expires = get("expires")
    if expires is not None and (type(expires) not in (int, float) or not expires >= 0):
        return False
    return not (get("countdown") or get("eta")) or not plan.has_quorum_queues()


def are_arguments(args: Any, kwargs: Any) -> bool:
    """Whether these can be a task's arguments; Celery has the words for it when they cannot."""
    return (args is None or isinstance(args, (list, tuple))) and (
        kwargs is None or type(kwargs) is dict or isinstance(kwargs, Mapping)
    )


def waits_for_celery(plan: Plan) -> bool:
    """Whether the moment is one in which Celery does more than publish."""
    if CALLBACK_RETRY is not None and CALLBACK_RETRY.get():
        return True
    return bool(plan.live("task_always_eager") or plan.live("task_send_sent_event"))


def options_of(task: Any) -> dict[str, Any]:
    """Return what a registered task says of the messages that are sent under its name."""
    read = getattr(task, "_get_exec_options", None)
    said = read() if inspect.ismethod(read) else {}
    return {"task_type": task, **{name: value for name, value in said.items() if value is not None}}


def new_task_id() -> str:
    """Return an id as Celery makes them, by whatever stands there for making them."""
    make = celery.app.base.uuid
    return new_uuid4() if make is UUID else str(make())


def inherit(plan: Plan, call: dict[str, Any], routed: dict[str, Any], request: Any) -> None:
    """Note in a call which running one it comes from."""
    if call.get("root_id") and call.get("parent_id"):
        return
    call["root_id"] = call.get("root_id") or request.root_id or request.id
    call["parent_id"] = call.get("parent_id") or request.id
    if plan.live("task_inherit_parent_priority"):
        routed.setdefault("priority", request.delivery_info.get("priority"))


def announce(plan: Plan, task_id: str) -> None:
    """Tell the result store of a call before it is sent, as far as that store needs to know."""
    backend = plan.app.backend
    needs = needs_of(type(backend).on_task_call)
    if needs == NOTHING or (needs == SUBSCRIPTION and not plan.subscribe_early):
        return
    if needs == REPLY_QUEUE:
        if task_join_will_block():
            return
        with contextlib.suppress(FastqError):
            if plan.outlet is not None and plan.outlet.declare_reply_queue(backend):
                return
    with acquired(plan.app) as producer:
        backend.on_task_call(producer, task_id)


@functools.cache
def needs_of(on_task_call: Any) -> int:
    """Return what a store's method of this name needs."""
    if is_own(on_task_call, celery.backends.base, "on_task_call"):
        return NOTHING
    module = getattr(on_task_call, "__module__", "")
    if module in ("celery.backends.redis", "celery.backends.rpc") and is_own(
        on_task_call, sys.modules[module], "on_task_call"
    ):
        return SUBSCRIPTION if module.endswith("redis") else REPLY_QUEUE
    return PRODUCER


def watched() -> bool:
    """Whether anybody listens to what is published."""
    return bool(
        signals.before_task_publish.receivers or signals.after_task_publish.receivers or signals.task_sent.receivers
    )


def hand_over(
    app: celery.Celery,
    body: Any,
    exchange: Any,
    routing_key: Any,
    declare: list[Any] | None,
    headers: dict[str, Any],
    properties: dict[str, Any],
    how: dict[str, Any],
) -> None:
    """Have kombu publish a message, with its retries and its errors."""
    address = {"exchange": exchange, "routing_key": routing_key, "declare": declare}
    with acquired(app) as producer:
        producer.publish(body, headers=headers, **address, **how, **properties)


@contextlib.contextmanager
def acquired(app: celery.Celery) -> Iterator[Any]:
    """Lend a producer of the application; errors of its connection become kombu's own."""
    with app.producer_or_acquire() as producer, producer.connection._reraise_as_library_errors():
        yield producer
