"""`fastq.accelerate`: results, signals, replaced functions, errors, forks and threads. What is sent: test_golden.py."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import amqp.basic_message
import celery
import celery.app.base
import kombu.messaging
import pytest
from celery import signals
from celery.utils.saferepr import saferepr
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu import Connection, Exchange, Producer, Queue
from kombu.exceptions import EncodeError as KombuEncodeError
from kombu.exceptions import OperationalError, SerializerNotInstalled
from kombu.utils.json import dumps as kombu_dumps
from redis import Redis as RedisClient

import fastq
from fastq.celery.sending._encode import short_repr, task_properties
from fastq.celery.sending.body import kombu_json
from fastq.celery.sending.sender import Sender
from fastq.errors import EncodeError, SettingsError
from fastq.wire.ids import new_uuid4
from tests.celery.conftest import OpenStage
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import RabbitMQ, Redis, wait_until

TIMEOUT_S = 20.0


def _add(x: int = 0, y: int = 0) -> int:
    return x + y


def _any(*args: Any) -> None:
    return None


def make(url: str, **options: Any) -> celery.Celery:
    """Return an accelerated application with the task ``add``, which is its attribute too."""
    app = celery.Celery("accelerated", broker=url, set_as_current=False)
    app.conf.update({"task_ignore_result": True, **options})
    app.add = app.task(name="accelerated.add")(_add)
    app.finalize()
    return fastq.accelerate(app)


def make_behind(url: str, **options: Any) -> celery.Celery:
    """Return the same application, which does not wait for Redis's answers."""
    app = make(url, **options)
    del app.send_task
    return fastq.accelerate(app, confirm_behind=True)


@pytest.fixture(
    params=[pytest.param("rabbitmq", marks=pytest.mark.rabbitmq), pytest.param("redis", marks=pytest.mark.redis)]
)
def broker_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty place on each broker."""
    if request.param == "rabbitmq":
        yield request.getfixturevalue("amqp_url")
        return
    url = request.getfixturevalue("redis_server").url(12)
    with RedisClient.from_url(url) as client:
        client.flushdb()
        yield url
        client.flushdb()


def taken(url: str, queue: str = "celery", count: int = 1, accept: list[str] | None = None) -> list[Any]:
    """Return kombu's messages from a queue."""
    with Connection(url) as connection:
        buffer = connection.SimpleQueue(queue, accept=accept)
        try:
            found = [buffer.get(timeout=TIMEOUT_S) for _ in range(count)]
            for message in found:
                message.ack()
            return found
        finally:
            buffer.close()


def used_kombu(app: celery.Celery) -> bool:
    """Whether the application's own producers were ever asked for."""
    return app.amqp._producer_pool is not None


# --- confirms behind


@pytest.mark.redis
def test_calls_that_do_not_wait_for_redis_are_the_same_and_all_arrive(redis_server: Redis) -> None:
    url = redis_server.url(12)
    with RedisClient.from_url(url) as client:
        client.flushdb()
        app = make(url)
        app.add.apply_async((1,), task_id="same")
        waited = json.loads(client.lpop("celery"))
        app.close()
        app = make_behind(url)
        app.add.apply_async((1,), task_id="same")
        for number in range(1000):
            app.add.delay(number)
        app.close()
        found = [json.loads(each) for each in reversed(client.lrange("celery", 0, -1))]
    assert len(found) == 1001
    assert [json.loads(base64.b64decode(each["body"]))[0] for each in found] == [[1], *([n] for n in range(1000))]
    for name in ("delivery_tag", "reply_to"):  # of the message, of the application
        waited["properties"][name] = found[0]["properties"][name]
    assert found[0] == waited


@pytest.mark.redis
def test_without_a_server_a_call_that_does_not_wait_raises_kombus_error(redis_server: Redis) -> None:
    with FaultProxy("127.0.0.1", redis_server.port) as proxy:
        away = proxy.url(redis_server.url(12))
    app = make_behind(away, task_publish_retry=False)
    with pytest.raises(OperationalError):
        app.add.delay(1)


# --- what comes back


@pytest.mark.parametrize(
    ("broker", "backend"),
    [
        pytest.param("amqp", "rpc", marks=pytest.mark.rabbitmq),
        pytest.param("redis", "redis", marks=pytest.mark.redis),
    ],
)
def test_results_of_accelerated_calls_come_back(open_stage: OpenStage, broker: str, backend: str) -> None:
    stage = open_stage("celery", broker, backend)
    fastq.accelerate(stage.client)
    stage.start_worker()
    results = [stage.tasks.add.delay(number, 1) for number in range(10)]
    assert [stage.get(result) for result in results] == list(range(1, 11))
    assert all(type(result) is stage.client.AsyncResult for result in results)


@pytest.mark.redis
@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")
def test_states_before_the_waiting_are_seen_when_it_subscribes_early(redis_server: Redis) -> None:
    app = celery.Celery("early", broker=redis_server.url(12), backend=redis_server.url(12), set_as_current=False)
    fastq.accelerate(app, subscribe_early=True)
    result = app.send_task("some.task")
    for step in (1, 2):
        app.backend.store_result(result.id, {"step": step}, "PROGRESS")
    seen: list[int] = []

    def look(meta: dict[str, Any]) -> None:
        if meta["status"] == "PROGRESS":
            seen.append(meta["result"]["step"])
        if seen[-1] == 1:
            app.backend.store_result(result.id, 42, "SUCCESS")

    assert result.get(timeout=TIMEOUT_S, on_message=look) == 42
    assert 1 in seen
    app.close()


def test_plain_calls_leave_kombu_alone_but_for_declaring(broker_url: str) -> None:
    app = make(broker_url)
    first = app.add.delay(1)
    pool, app.amqp._producer_pool = app.amqp._producer_pool, None
    results = [
        app.add.delay(2),
        app.add.apply_async((3,), {"y": 4}),
        app.add.apply_async((4,), priority=3, headers={"a": 1}),
    ]
    assert not used_kombu(app)
    app.amqp._producer_pool = pool
    messages = taken(broker_url, count=4)
    assert {message.headers["id"] for message in messages} == {result.id for result in (first, *results)}
    app.close()


def test_what_only_pythons_json_reads_is_sent_as_celery_sends_it(broker_url: str) -> None:
    sent = []
    for app in (make(broker_url), celery.Celery(broker=broker_url, set_as_current=False)):
        mark = {"headers": {"mark": "caf\udce9"}, "task_id": f"\ud800-{app.main}"}
        app.send_task("any", (float("nan"), "caf\udce9"), {"x": [float("inf")]}, **mark)
        sent += taken(broker_url)
        app.close()
    ours, theirs = sent
    assert repr(ours.payload) == repr(theirs.payload)
    for name in ("argsrepr", "kwargsrepr", "mark"):
        assert ours.headers[name] == theirs.headers[name]
    assert ours.headers["id"].startswith("\ud800")


# --- signals


def test_handlers_may_change_headers_and_properties(broker_url: str) -> None:
    app = make(broker_url)
    seen: list[dict[str, Any]] = []

    def before(sender: str, headers: dict[str, Any], properties: dict[str, Any], **rest: Any) -> None:
        headers["trace"] = "abc"
        properties["priority"] = 5
        seen.append({"sender": sender, **rest})

    def after(headers: dict[str, Any], routing_key: str, **rest: Any) -> None:
        seen.append({"routing_key": routing_key, "trace": headers["trace"]})

    signals.before_task_publish.connect(before)
    signals.after_task_publish.connect(after)
    try:
        app.add.delay(1)
        app.add.delay(2)
    finally:
        signals.before_task_publish.disconnect(before)
        signals.after_task_publish.disconnect(after)
    messages = taken(broker_url, count=2)
    assert [message.headers["trace"] for message in messages] == ["abc", "abc"]
    assert [message.properties["priority"] for message in messages] == [5, 5]
    assert seen[0].keys() == {
        "sender",
        "signal",
        "body",
        "exchange",
        "routing_key",
        "declare",
        "retry_policy",
    }
    assert seen[1] == {"routing_key": "celery", "trace": "abc"}
    assert seen[0]["retry_policy"]["max_retries"] == 3
    app.close()


def test_a_property_of_a_handler_is_sent_as_well(amqp_url: str) -> None:
    app = make(amqp_url)

    def before(properties: dict[str, Any], **rest: Any) -> None:
        properties["message_id"] = "mine"

    signals.before_task_publish.connect(before)
    try:
        app.add.delay(1)
    finally:
        signals.before_task_publish.disconnect(before)
    assert taken(amqp_url)[0].properties["message_id"] == "mine"
    app.close()


def test_task_sent_is_sent(amqp_url: str) -> None:
    app = make(amqp_url)
    seen: list[dict[str, Any]] = []

    def sent(**values: Any) -> None:
        seen.append(values)

    signals.task_sent.connect(sent)
    try:
        result = app.add.delay(1, y=2)
    finally:
        signals.task_sent.disconnect(sent)
    assert (seen[0]["task_id"], seen[0]["args"], seen[0]["kwargs"]) == (result.id, (1,), {"y": 2})
    app.close()


# --- what others have replaced


def test_a_send_task_of_a_subclass_is_called(amqp_url: str) -> None:
    class Own(celery.Celery):
        calls = 0

        def send_task(self, *args: Any, **options: Any) -> Any:
            self.calls += 1
            return super().send_task(*args, **options)

    app = fastq.accelerate(Own("own", broker=amqp_url, set_as_current=False))
    app.conf.task_ignore_result = True
    app.send_task("some.task")
    assert app.calls == 1
    assert taken(amqp_url)[0].headers["task"] == "some.task"
    app.close()


@pytest.mark.parametrize(
    ("owner", "name"),
    [(celery.Celery, "send_task"), (kombu.messaging.Producer, "publish"), (celery.Task, "apply_async")],
)
def test_functions_replaced_later_are_called(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    app = make(amqp_url)
    app.add.delay(1)
    calls: list[str] = []
    original = getattr(owner, name)

    def replaced(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(name)
        return original(self, *args, **options)

    monkeypatch.setattr(owner, name, replaced)
    app.add.delay(2)
    monkeypatch.undo()
    app.add.delay(3)
    assert calls == [name]
    assert sorted(message.payload[0] for message in taken(amqp_url, count=3)) == [[1], [2], [3]]
    app.close()


def test_apply_async_of_a_task_class_is_called(amqp_url: str) -> None:
    class Base(celery.Task):
        def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            return super().apply_async((*args, "added"), kwargs, **options)

    app = make(amqp_url)
    task = app.task(name="accelerated.own", base=Base)(_any)
    for _ in range(2):
        task.delay(1)
    assert [message.payload[0] for message in taken(amqp_url, count=2)] == [[1, "added"], [1, "added"]]
    app.close()


def test_wrong_arguments_are_refused_each_time(amqp_url: str) -> None:
    app = make(amqp_url)
    for _ in range(2):
        with pytest.raises(TypeError):
            app.add.delay(1, 2, 3)
        app.add.delay(1)
    with pytest.raises(TypeError, match="list or tuple"):
        app.send_task("some.task", args="text")
    app.close()


# --- what is left to Celery


def test_eager_tasks_run_here(amqp_url: str) -> None:
    app = make(amqp_url)
    app.add.delay(1)
    app.conf.task_always_eager = True
    assert app.add.delay(1, 2).get() == 3
    with pytest.warns(celery.exceptions.AlwaysEagerIgnored):
        app.send_task("accelerated.add", (5,))
    app.conf.task_always_eager = False
    assert [message.payload[0] for message in taken(amqp_url, count=2)] == [[1], [5]]
    app.close()


def test_protocol_1_is_left_to_celery(amqp_url: str) -> None:
    app = make(amqp_url, task_protocol=1)
    app.add.delay(7)
    assert taken(amqp_url)[0].payload["args"] == [7]
    app.close()


def test_sent_events_are_left_to_celery(amqp_url: str) -> None:
    app = make(amqp_url, task_send_sent_event=True)
    with app.connection_for_read() as connection:
        queue = Queue("events", Exchange("celeryev", type="topic"), "#", durable=False, auto_delete=True)
        buffer = connection.SimpleQueue(queue)
        result = app.add.delay(7)
        event = buffer.get(timeout=TIMEOUT_S)
        buffer.close()
    assert (event.payload["type"], event.payload["uuid"]) == ("task-sent", result.id)
    app.close()


def test_a_given_connection_or_producer_is_used(amqp_url: str) -> None:
    app = make(amqp_url)
    with Connection(amqp_url) as connection, Connection(amqp_url) as other:
        app.add.apply_async((1,), connection=connection)
        app.add.apply_async((2,), producer=Producer(other))
        assert connection.connected
        assert other.connected
    assert [message.payload[0] for message in taken(amqp_url, count=2)] == [[1], [2]]
    app.close()


def test_another_broker_is_left_to_kombu() -> None:
    app = make("memory://")
    result = app.add.delay(1)
    with app.connection_for_read() as connection:
        buffer = connection.SimpleQueue("celery")
        assert buffer.get(timeout=TIMEOUT_S).headers["id"] == result.id
        buffer.close()
    app.close()


def test_patched_sockets_are_left_to_kombu(monkeypatch: pytest.MonkeyPatch, amqp_url: str) -> None:
    program = (
        "import sys, types\n"
        "patched = types.ModuleType('gevent.monkey')\n"
        "patched.is_module_patched = lambda name: name == 'socket'\n"
        "sys.modules['gevent.monkey'] = patched\n"
        "import celery\n"
        "from fastq.celery.sending.stock import obstacle\n"
        "app = celery.Celery('t')\n"
        "app.amqp.send_task_message\n"
        "print(obstacle(app))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "the process is monkey-patched by gevent"


# --- errors


def test_a_broker_that_is_away_raises_kombus_error(broker_url: str) -> None:
    nowhere = broker_url.split("://")[0] + "://127.0.0.1:9/"
    app = make(nowhere, broker_transport_options={"socket_connect_timeout": 1})
    with pytest.raises(OperationalError):
        app.add.apply_async((1,), retry=False)
    policy = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}
    with pytest.raises(OperationalError):
        app.add.apply_async((1,), retry_policy=policy)
    app.close()


def test_a_lost_connection_is_replaced_at_the_next_message(
    broker_url: str, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    with Connection(broker_url) as connection:
        proxy = fault_proxy("127.0.0.1", int(connection.port))
    app = make(proxy.url(broker_url))
    app.add.delay(1)
    assert taken(broker_url)[0].payload[0] == [1]
    proxy.cut()
    for number in range(2, 5):
        app.add.delay(number)
    assert sorted(message.payload[0][0] for message in taken(broker_url, count=3)) == [2, 3, 4]
    app.close()


def refused(app: celery.Celery) -> BaseException | None:
    """Return what is raised for the first message that a full queue does not take."""
    try:
        for _ in range(3):
            app.send_task("some.task", retry=False, ignore_result=True)
    except Exception as error:
        return error
    return None


@pytest.mark.rabbitmq
def test_with_confirms_a_refusal_is_raised_as_kombu_raises_it(amqp_url: str) -> None:
    full = Queue("full", Exchange("full"), "full", queue_arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    options = {
        "task_queues": [full],
        "task_default_queue": "full",
        "broker_transport_options": {"confirm_publish": True},
    }
    errors = []
    for app in (make(amqp_url, **options), celery.Celery("stock", broker=amqp_url, set_as_current=False)):
        app.conf.update(options)
        errors.append(type(refused(app)))
        app.close()
    assert errors[0] is errors[1]
    assert errors[0] is not type(None)


@pytest.mark.rabbitmq
def test_a_message_to_a_deleted_queue_is_dropped_as_in_celery(
    rabbitmq: RabbitMQ, amqp_url: str, amqp_vhost: str
) -> None:
    app = make(amqp_url, broker_transport_options={"confirm_publish": True})
    app.add.delay(1)
    with Connection(amqp_url) as connection:
        connection.default_channel.queue_delete("celery")
    app.add.delay(2)
    assert rabbitmq.queue_depth(amqp_vhost, "celery") == -1, "there is no such queue"
    app.close()
    other = make(amqp_url)
    other.add.delay(3)
    assert rabbitmq.queue_depth(amqp_vhost, "celery") == 1
    assert [each.payload[0][0] for each in taken(amqp_url)] == [3]
    other.close()


def test_a_form_that_the_applications_workers_refuse_is_refused_at_once(broker_url: str) -> None:
    app = make(broker_url)
    pickled = app.task(name="accelerated.pickled", serializer="pickle")(_any)
    calls = (
        lambda: app.add.apply_async((1, 2), serializer="pickle"),
        lambda: app.send_task("accelerated.add", (1, 2), serializer="pickle"),
        pickled.delay,
        pickled.delay,
    )
    for call in calls:
        with pytest.raises(KombuEncodeError, match=r"serializer 'pickle'.*accept_content is \['json'\]. Add 'pickle'"):
            call()
    with pytest.raises(SerializerNotInstalled):
        app.add.apply_async((1, 2), serializer="jsn")
    app.send_task("somebody.elses", (1, 2), serializer="pickle")  # whose workers may take it
    app.conf.accept_content = ["application/json", "pickle"]
    pickled.delay()
    found = [each.headers["task"] for each in taken(broker_url, count=2, accept=["pickle"])]
    assert found == ["somebody.elses", "accelerated.pickled"]
    app.close()


def test_a_form_that_every_worker_takes_is_sent(broker_url: str, own_serializers: None) -> None:
    kombu.serialization.register("trusted", json.dumps, json.loads, "application/data", "utf-8")
    app = make(broker_url)
    app.add.apply_async((1, 2), serializer="trusted")
    assert [each.content_type for each in taken(broker_url, accept=["trusted"])] == ["application/data"]
    app.close()


def test_a_call_by_name_leaves_the_application_unfinished(broker_url: str) -> None:
    app = celery.Celery("unfinished", broker=broker_url, autofinalize=False, set_as_current=False)
    fastq.accelerate(app)
    app.send_task("somebody.elses", (1,))
    assert not app.finalized
    assert [each.headers["task"] for each in taken(broker_url)] == ["somebody.elses"]
    app.close()


def test_arguments_that_cannot_be_written_raise_kombus_error(broker_url: str) -> None:
    app = make(broker_url)
    app.add.delay(1)
    with pytest.raises(kombu.exceptions.EncodeError):
        app.add.delay(object())
    app.close()


# --- processes and threads


def test_a_forked_child_opens_a_connection_of_its_own(broker_url: str) -> None:
    app = make(broker_url)
    app.add.delay(1)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for number in range(2, 12):
                app.add.delay(number)
            status = 0
        finally:
            os._exit(status)
    for number in range(12, 22):
        app.add.delay(number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sorted(message.payload[0][0] for message in taken(broker_url, count=21)) == list(range(1, 22))
    app.close()


@pytest.mark.redis
@pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # Celery's
def test_a_forked_child_waits_for_results_on_a_connection_of_its_own(redis_server: Redis) -> None:
    """Celery's consumer of results would go on with the parent's, and each would read what is for the other."""
    url = redis_server.url(12)
    app = make(url, result_backend=url, task_ignore_result=False)
    ids = [new_uuid4() for _ in range(2)]
    handles = [app.AsyncResult(task_id) for task_id in ids]
    for handle in handles:
        app.backend.add_pending_result(handle)  # as a call does: subscribed before the fork
    name, consumer = app.thread_oid, app.backend.result_consumer
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            mine = app.AsyncResult(ids[0])
            is_new = app.backend.result_consumer is not consumer and app.thread_oid != name
            status = 0 if is_new and mine.get(timeout=TIMEOUT_S) == 1 else 2
        finally:
            os._exit(status)
    with RedisClient.from_url(url) as client:
        wait_until(
            lambda: client.pubsub_numsub(app.backend.get_key_for_task(ids[0]))[0][1] == 2,
            TIMEOUT_S,
            lambda: TimeoutError("the child has not subscribed"),
        )
    for number, task_id in enumerate(ids, start=1):
        app.backend.store_result(task_id, number, "SUCCESS")
    assert [handle.get(timeout=TIMEOUT_S) for handle in handles] == [1, 2]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    app.close()


def test_threads_share_the_connection(broker_url: str) -> None:
    app = make(broker_url)

    def send(start: int) -> None:
        for number in range(start, start + 25):
            app.add.delay(number)

    threads = [threading.Thread(target=send, args=(start * 25,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(message.payload[0][0] for message in taken(broker_url, count=200)) == list(range(200))
    app.close()


def test_close_ends_the_connection_and_the_next_message_opens_another(rabbitmq: RabbitMQ, amqp_url: str) -> None:
    app = make(amqp_url)
    app.add.delay(1)
    app.close()
    app.add.delay(2)
    assert len(taken(amqp_url, count=2)) == 2
    app.close()


# --- accelerate itself


def test_it_reads_no_setting_before_the_first_message(amqp_url: str) -> None:
    app = celery.Celery("late", set_as_current=False)
    assert fastq.accelerate(app) is app
    assert not app.configured
    app.config_from_object({"broker_url": amqp_url, "task_default_queue": "late"})
    app.send_task("some.task", ignore_result=True)
    assert taken(amqp_url, "late")[0].headers["task"] == "some.task"
    app.close()


def test_doing_it_twice_changes_nothing() -> None:
    app = fastq.accelerate(celery.Celery("twice", set_as_current=False))
    first = app.send_task
    assert fastq.accelerate(app).send_task is first
    assert isinstance(first.__self__, Sender)


def test_what_is_no_application_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"takes a celery\.Celery application"):
        fastq.accelerate("proj.celery")  # type: ignore[arg-type]


def test_an_old_celery_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(celery, "VERSION", celery.VERSION._replace(major=5, minor=3))
    with pytest.raises(SettingsError, match=r"needs Celery 5\.4"):
        fastq.accelerate(celery.Celery("old", set_as_current=False))


def test_a_default_queue_set_later_counts(broker_url: str) -> None:
    app = make(broker_url)
    app.add.delay(1)
    app.conf.task_default_queue = "other"
    app.add.delay(2)
    app.add.apply_async((3,), priority=0)
    assert [message.payload[0] for message in taken(broker_url, "other", 2)] == [[2], [3]]
    app.close()


def test_a_queue_that_is_defined_anew_counts(amqp_url: str) -> None:
    app = make(amqp_url)
    app.add.delay(1)
    app.amqp.queues.add(Queue("celery", Exchange("celery", delivery_mode=1), "celery"))
    app.add.delay(2)
    assert [message.properties["delivery_mode"] for message in taken(amqp_url, count=2)] == [2, 1]
    app.close()


# --- bytes and text

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40)
plain = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.lists(plain, max_size=5).map(tuple), st.integers(4, 1024), st.integers(1, 5))
@settings(max_examples=400, deadline=None)
def test_arguments_are_shown_as_celery_shows_them(value: Any, max_size: int, levels: int) -> None:
    text = short_repr(value, max_size, levels)
    assert text is None or text == saferepr(value, max_size, levels)


def test_most_arguments_need_not_be_shown_by_celery() -> None:
    assert short_repr((1, "it's", {"a": [2.5, (True,)]}), 1024, 3) == "(1, 'it\\'s', {'a': [2.5, (...,)]})"
    assert short_repr(("x" * 1100,), 1024, 3) is None
    assert short_repr((Decimal(1),), 1024, 3) is None


def test_arguments_that_contain_themselves_are_left_to_celery() -> None:
    value: list[Any] = [1]
    value.append(value)
    assert short_repr((value,), 1024, 3) is None
    assert short_repr((value,), 1024, 2) == saferepr((value,), 1024, 2) or short_repr((value,), 1024, 2) is None


@given(st.lists(plain, max_size=5).map(tuple))
@settings(max_examples=200, deadline=None)
def test_json_is_written_as_kombu_writes_it(value: Any) -> None:
    assert kombu_json(value) == kombu_dumps(value).encode()


@pytest.mark.parametrize(
    "value",
    ["\x7f", 'a"b\\c\n', "ü\ud800€😀", -0.0, 1e300, 1e-7, float("inf"), float("nan"), 10**30, True, {1: 2}, {None: 1}],
    ids=ascii,
)
def test_json_of_unusual_values_is_written_as_kombu_writes_it(value: Any) -> None:
    for each in (value, [value], {"key": (value, [])}):
        assert kombu_json(each) == kombu_dumps(each).encode()


def test_json_that_is_nested_deeply_is_written_as_kombu_writes_it() -> None:
    value: Any = {}
    for _ in range(100):
        value = [value]
        assert kombu_json(value) == kombu_dumps(value).encode()


def test_a_value_in_two_threads_is_no_circle() -> None:
    shared = {"a": [object()]}
    found: list[bytes] = []

    def default(_: object) -> int:
        found.append(json.dumps(1).encode())
        return 1

    from fastq.celery.sending._encode import dump_json

    assert dump_json([shared, shared], default) == b'[{"a": [1]}, {"a": [1]}]'


header_values = st.recursive(
    scalars.filter(lambda value: not isinstance(value, int) or -(2**63) <= value < 2**63) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=10), header_values, max_size=6), st.none() | st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_properties_are_encoded_as_py_amqp_encodes_them(headers: dict[str, Any], priority: int | None) -> None:
    ours = task_properties("application/json", "utf-8", headers, 2, priority, "id", "", "1500")
    message = amqp.basic_message.Message(
        b"",
        content_type="application/json",
        content_encoding="utf-8",
        application_headers=headers,
        delivery_mode=2,
        priority=priority,
        correlation_id="id",
        reply_to="",
        expiration="1500",
    )
    assert ours == message._serialize_properties()


@pytest.mark.parametrize("value", [Decimal(1), 2**64, object(), {1: 2}, "\ud800"])
def test_headers_that_only_py_amqp_can_judge_are_refused(value: Any) -> None:
    with pytest.raises(EncodeError):
        task_properties("a", "b", {"x": value}, 2, 0, "id", "", None)


def test_ids_are_random_uuids_of_version_4() -> None:
    import uuid

    ids = {new_uuid4() for _ in range(2000)}
    assert len(ids) == 2000
    assert all(uuid.UUID(each).version == 4 and uuid.UUID(each).variant == uuid.RFC_4122 for each in ids)
