"""Tasks: calling, sending, eager runs, retries, the request, and what a message says."""

from __future__ import annotations

import functools
import math
import pickle
import re
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from fastq import FastQ, Task
from fastq.errors import EncodeError, Ignore, MaxRetriesExceeded, Reject, Retry, SettingsError
from fastq.request import Request, current, pop_request, push_request
from fastq.result import AsyncResult, EagerResult
from fastq.sending.parameters import Parameters
from fastq.steps.retry import RetryPolicy, on_exception
from fastq.task import ExceptionInfo
from fastq.wire.message import Message, encode_task
from fastq.wire.properties import decode_properties
from tests.support.recording import RecordingPublisher, RecordingStore, body, headers, received


@pytest.fixture
def app() -> FastQ:
    app = FastQ("proj", broker="memory://")
    app.publisher = RecordingPublisher()
    app.store = RecordingStore()
    return app


def sent(app: FastQ) -> list[Message]:
    publisher = app.publisher
    assert isinstance(publisher, RecordingPublisher)
    return publisher.messages


def add(x: int, y: int = 0) -> int:
    return x + y


class Running:
    """Makes a message the running call, as a child does."""

    def __init__(self, message: Message, **options: Any) -> None:
        call = received(message, **options)
        args, kwargs, embed = body(message)
        self.request = Request.from_call(call, args, kwargs, "celery@host", embed)

    def __enter__(self) -> Request:
        push_request(self.request)
        return self.request

    def __exit__(self, *exc: object) -> None:
        pop_request()


# --- calling and sending ----------------------------------------------------------------------------------------------


def test_a_direct_call_runs_the_function_and_sends_nothing(app: FastQ) -> None:
    assert app.task(add)(2, y=3) == 5
    assert sent(app) == []


def test_delay_sends_the_arguments_and_returns_the_handle(app: FastQ) -> None:
    result = app.task(add).delay(1, y=2)
    (message,) = sent(app)
    assert type(result) is AsyncResult
    assert result.id == message.id
    assert body(message) == [[1], {"y": 2}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    found = headers(message)
    assert found["task"] == f"{__name__}.add"
    assert (found["argsrepr"], found["kwargsrepr"]) == ("(1,)", "{'y': 2}")
    assert (found["root_id"], found["parent_id"], found["retries"]) == (result.id, None, 0)
    assert (message.exchange, message.routing_key) == ("", "celery")


def test_every_call_gets_an_id_of_its_own(app: FastQ) -> None:
    task = app.task(add)
    assert len({task.delay(1).id for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((), {"y": 1}), ((1,), {"x": 1}), ((1,), {"z": 1})]
)
def test_arguments_that_do_not_fit_are_refused_before_sending(app: FastQ, args: Any, kwargs: Any) -> None:
    task = app.task(add)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"test_task\.add\(\)|argument"):
            task.delay(*args, **kwargs)
        with pytest.raises(TypeError):
            task.apply_async(args, kwargs)
        task.delay(1)
    loose = app.task(name="loose", typing=False)(add)
    loose.delay(*args, **kwargs)


def only_names(*, a: int, b: int = 0) -> None: ...


def only_positions(a: int, b: int = 0, /) -> None: ...


def anything(*args: int, **kwargs: int) -> None: ...


def mixed(a: int, *rest: int, b: int, **more: int) -> None: ...


CALLS: list[tuple[tuple[int, ...], dict[str, int]]] = [
    (args, kwargs)
    for args in ((), (1,), (1, 2), (1, 2, 3))
    for kwargs in ({}, {"a": 1}, {"b": 1}, {"a": 1, "b": 2}, {"c": 3}, {"b": 1, "c": 2})
]


@pytest.mark.parametrize(
    "function", [only_names, only_positions, anything, mixed, functools.partial(only_positions, 1), max]
)
def test_the_check_of_arguments_agrees_with_the_call_itself(function: Any) -> None:
    parameters = Parameters(function)
    for args, kwargs in CALLS:
        if function is max:  # tells nothing about its parameters: everything may be sent
            parameters.check(args, kwargs)
            continue
        try:
            function(*args, **kwargs)
        except TypeError:
            with pytest.raises(TypeError):
                parameters.check(args, kwargs)
        else:
            parameters.check(args, kwargs)


def test_bind_passes_the_task_itself(app: FastQ) -> None:
    @app.task(bind=True)
    def who(self: Task[..., Any], suffix: str) -> str:
        assert self.request.called_directly
        return self.name + suffix

    assert who("!") == f"{__name__}.who!"
    who.delay("!")
    assert body(sent(app)[0])[0] == ["!"]
    with pytest.raises(TypeError):
        who.delay()  # type: ignore[call-arg]


def test_a_value_that_cannot_be_sent_fails_at_the_sender(app: FastQ) -> None:
    with pytest.raises(EncodeError, match="no JSON form"):
        app.task(add).delay(object())  # type: ignore[arg-type]
    assert sent(app) == []


@pytest.mark.parametrize("serializer", ["json", "msgpack", "yaml"])
def test_the_argument_that_cannot_be_sent_is_named(app: FastQ, serializer: str) -> None:
    app.conf.accept_content = [serializer]
    task = app.task(name="many", serializer=serializer)(lambda *args, **kwargs: None)
    loop: list[Any] = []
    loop.append(loop)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((1, object()), {}, "(argument 2 of task 'many')"),
        ((1,), {"at": object()}, "(argument 'at' of task 'many')"),
        (([0, {"when": [object()]}],), {}, "(argument 1[1]['when'][0] of task 'many')"),
    ]
    for args, kwargs, words in cases:
        with pytest.raises(EncodeError, match=re.escape(words) + "$"):
            task.delay(*args, **kwargs)
    if serializer == "json":
        with pytest.raises(EncodeError, match=r"\(argument 1(\[0\])+ of task"):
            task.delay(loop)
    assert sent(app) == []


@pytest.mark.parametrize(
    ("args", "kwargs", "place"),
    [
        (({"v": [1.0, math.inf]},), {}, r"form: inf: .* \(argument 1\['v'\]\[1\] of task"),
        ((b"tagged",), {"y": [0, (-math.inf,)]}, r"form: -inf: .* \(argument 'y'\[1\]\[0\] of task"),
    ],
)
def test_a_number_that_json_has_no_word_for_is_refused_with_its_place(
    app: FastQ, args: tuple[Any, ...], kwargs: dict[str, Any], place: str
) -> None:
    with pytest.raises(EncodeError, match=place):
        app.task(add).apply_async(args, kwargs)
    with pytest.raises(EncodeError, match=place):
        app.send_task("elsewhere", args, kwargs)
    with pytest.raises(ValueError, match="task_id is no text in UTF-8"):
        app.send_task("elsewhere", task_id="caf\udce9")
    assert sent(app) == []


def test_an_apply_async_of_the_users_sees_every_delay(app: FastQ) -> None:
    class Counted(Task[..., Any]):
        calls = 0

        def apply_async(self, *args: Any, **options: Any) -> AsyncResult[Any]:
            type(self).calls += 1
            return super().apply_async(*args, **options)

    task = app.task(base=Counted)(add)
    task.delay(1)
    task.delay(1)
    assert Counted.calls == len(sent(app)) == 2


def test_every_option_reaches_the_message(app: FastQ) -> None:
    before = time.time()
    app.task(add).apply_async(
        (1,),
        {"y": 2},
        task_id="given",
        countdown=60,
        expires=120,
        queue="q",
        priority=7,
        compression="zlib",
        headers={"x-trace": "t", "n": 5},
        ignore_result=True,
        time_limit=30,
        soft_time_limit=2.5,
        shadow="alias",
        reply_to="somewhere",
    )
    (message,) = sent(app)
    found, properties = headers(message), decode_properties(message.props)
    assert message.due == pytest.approx(before + 60, abs=5)
    assert message.expires == pytest.approx(before + 120, abs=5)
    assert (message.id, message.routing_key, message.priority) == ("given", "q", 7)
    assert found["timelimit"] == [30, 2.5]
    assert (found["shadow"], found["x-trace"], found["n"], found["ignore_result"]) == ("alias", "t", 5, True)
    assert found["compression"] == "application/x-gzip"
    assert properties["reply_to"] == "somewhere"
    assert datetime.fromisoformat(found["eta"]).timestamp() == pytest.approx(before + 60, abs=5)
    assert 110_000 < int(properties["expiration"]) <= 120_000


def test_options_of_the_task_reach_the_message_and_expires_counts_from_each_sending(
    app: FastQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.conf.accept_content = ["json", "pickle"]
    task = app.task(expires=10, priority=3, time_limit=60, serializer="pickle", queue="q")(add)
    task.delay(1)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1000)
    task.delay(1)
    first, second = sent(app)
    assert first.expires == pytest.approx(now + 10, abs=5)
    assert second.expires == pytest.approx(now + 1010, abs=1)
    assert (first.priority, first.routing_key, headers(first)["timelimit"]) == (3, "q", [60, None])
    assert decode_properties(first.props)["content_type"] == "application/x-python-serialize"


def test_a_moment_without_a_zone_is_in_the_zone_of_the_settings(app: FastQ) -> None:
    task = app.task(add)
    moment = datetime(2030, 6, 1, 12)
    for option in ("eta", "expires"):
        with pytest.raises(ValueError, match=f"{option} is 2030-06-01 12:00:00, which could be any zone's time"):
            task.apply_async((1,), **{option: moment})  # type: ignore[arg-type]
    with app.override(timezone="UTC"):
        task.apply_async((1,), eta=moment, expires=moment)
    task.apply_async((1,), eta=moment.replace(tzinfo=timezone(timedelta(hours=2))))
    with app.override(timezone="Europe/Berlin"):
        task.apply_async((1,), eta=moment)
    utc = datetime(2030, 6, 1, 12, tzinfo=timezone.utc).timestamp()
    assert [message.due for message in sent(app)] == [utc, utc - 7200, utc - 7200]
    assert sent(app)[0].expires == utc
    with pytest.raises(SettingsError, match="'Mars/Crater'"):
        FastQ(broker="memory://", timezone="Mars/Crater").finalize()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"countdown": 1, "eta": datetime(2030, 1, 1)}, ValueError, "one of them"),
        ({"countdown": "5"}, TypeError, "countdown is '5'"),
        ({"countdown": math.nan}, ValueError, "countdown is nan"),
        ({"countdown": True}, TypeError, "countdown is True"),
        ({"eta": 5.0}, TypeError, "expected a datetime"),
        ({"expires": "soon"}, TypeError, "expires is 'soon'; expected a number of seconds or a datetime"),
        ({"retry": "no"}, TypeError, "retry is 'no'; expected True or False"),
        ({"retry_policy": 5}, TypeError, "retry_policy is 5; expected a dict"),
        ({"retry_policy": 5, "retry": False}, TypeError, "retry_policy is 5; expected a dict"),
        ({"queue": 5}, TypeError, "queue is 5"),
        ({"queue": ""}, ValueError, "1 to 255 bytes"),
        ({"routing_key": "é" * 128}, ValueError, "1 to 255 bytes"),
        ({"priority": -1}, ValueError, "0 to 255"),
        ({"priority": 1.0}, TypeError, "0 to 255"),
        ({"serializer": "xml"}, SettingsError, "unknown serializer 'xml'"),
        ({"compression": "rar"}, EncodeError, "unknown compression 'rar'"),
        ({"headers": [1]}, TypeError, "expected a dict"),
        ({"headers": {"task": "x"}}, ValueError, "belongs to the task protocol"),
        ({"headers": {5: "x"}}, TypeError, "header's name"),
        ({"headers": {"x": object()}}, EncodeError, "no AMQP form"),
        ({"task_id": 5}, TypeError, "task_id is 5"),
        ({"task_id": "x" * 256}, ValueError, "task_id must have"),
        ({"time_limit": -5}, ValueError, "time_limit is -5"),
        ({"ignore_result": "no"}, TypeError, "True or False"),
        ({"coutdown": 5}, TypeError, "did you mean 'countdown'"),
        ({"args": 5}, TypeError, "expected a list or tuple"),
        ({"args": "text"}, TypeError, "expected a list or tuple"),
        ({"kwargs": [1]}, TypeError, "expected a dict"),
    ],
)
def test_a_wrong_option_of_a_call_is_named(app: FastQ, options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        app.task(add).apply_async(**{"args": (1,), **options})
    assert sent(app) == []


def test_a_task_that_belongs_to_no_app_says_so() -> None:
    with pytest.raises(SettingsError, match="register"):
        Task().delay()


# --- inside a worker --------------------------------------------------------------------------------------------------


def test_a_task_sent_by_a_task_knows_its_family(app: FastQ) -> None:
    task = app.task(add)
    root = task.delay(1)
    with Running(sent(app)[0]) as outer:
        child = task.delay(2)
        assert outer.children == [child]
        with Running(sent(app)[1]):
            grandchild = task.delay(3)
    found = [headers(message) for message in sent(app)]
    assert [(one["root_id"], one["parent_id"]) for one in found] == [
        (root.id, None),
        (root.id, root.id),
        (root.id, child.id),
    ]
    assert grandchild.id == found[2]["id"]
    task.delay(4)
    assert headers(sent(app)[3])["parent_id"] is None


def test_a_task_called_directly_by_a_task_sends_in_the_outer_one_s_name(app: FastQ) -> None:
    task = app.task(add)

    @app.task(bind=True)
    def inner(self: Task[..., Any]) -> bool:
        task.delay(2)
        return self.request.called_directly

    result = task.delay(1)
    with Running(sent(app)[0]):
        assert inner() is True
    assert headers(sent(app)[1])["parent_id"] == result.id


def test_inside_a_worker_messages_carry_no_reply_address(app: FastQ) -> None:
    app.store = RecordingStore(address="mine")
    task = app.task(add)
    task.delay(1)
    message = sent(app)[0]
    app.sender.forget_envelopes()
    with Running(message):
        task.delay(2)
    assert decode_properties(message.props)["reply_to"] == "mine"
    assert "reply_to" not in decode_properties(sent(app)[1].props)


def test_the_request_shows_the_message(app: FastQ) -> None:
    task = app.task(add)
    task.apply_async(
        (1,),
        {"y": 2},
        headers={"traceparent": "00-1", "x-my-header": 5},
        time_limit=30,
        soft_time_limit=20,
        priority=4,
        shadow="alias",
        reply_to="back",
        expires=100,
    )
    message = sent(app)[0]
    with Running(message, redelivered=True) as request:
        assert task.request is request
        assert current() is request
        assert app.current_task is task
        assert (request.id, request.task, request.args, request.kwargs) == (message.id, task.name, [1], {"y": 2})
        assert (request.retries, request.hostname, request.is_eager) == (0, "celery@host", False)
        assert (request.called_directly, request.utc) == (False, True)
        assert (request.root_id, request.parent_id, request.group, request.taskset) == (message.id, None, None, None)
        assert (list(request.timelimit), request.time_limit, request.soft_time_limit) == ([30, 20], 30, 20)
        assert (request.shadow, request.reply_to, request.correlation_id) == ("alias", "back", message.id)
        assert request.delivery_info == {"exchange": "", "routing_key": "celery", "priority": 4, "redelivered": True}
        assert request.properties["content_type"] == "application/json"
        assert request.headers == {"traceparent": "00-1", "x-my-header": 5}
        assert request.traceparent == "00-1"
        assert request.get("x-my-header") == 5
        assert request.get("nothing", "default") == "default"
        assert (request.callbacks, request.errbacks, request.chain, request.chord) == (None, None, None, None)
        assert request.eta is None
        assert isinstance(request.expires, str)
        with pytest.raises(AttributeError, match="no header 'nothing'"):
            request.nothing  # noqa: B018
    assert task.request.called_directly
    assert task.request.id is None
    assert current() is None


@pytest.mark.parametrize("name", ["get", "children", "_call", "_outer", "args", "spawned", "headers", "is_eager"])
def test_a_header_cannot_take_the_place_of_a_field(name: str) -> None:
    message = encode_task("t", "i", b"[[1], {}, {}]", headers={name: "hostile"})
    with Running(message) as request:
        assert request.headers == {name: "hostile"}
        assert request.root_id == "i"
        assert getattr(request, name) != "hostile"
        assert request.args == [1]


def test_hostile_headers_do_not_break_the_request() -> None:
    message = encode_task("t", "i", b"[[], {}, {}]", headers={"timelimit": 5, "ignore_result": "x", "group": ["a"]})
    with Running(message) as request:
        assert list(request.timelimit) in ([None, None], [])


# --- retries ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def retrying(app: FastQ) -> Task[..., Any]:
    @app.task(bind=True, max_retries=2, default_retry_delay=7)
    def retrying(self: Task[..., Any], x: int, y: int = 0) -> None: ...

    return retrying


def run_again(message: Message, retries: int) -> Message:
    """Return the message with another number of retries, as it looks after so many."""
    found = headers(message)
    return encode_task(found["task"], found["id"], message.body, retries=retries, root_id=found["root_id"])


def test_retry_sends_the_same_call_with_one_retry_more(app: FastQ, retrying: Task[..., Any]) -> None:
    retrying.apply_async((1,), {"y": 2}, headers={"trace": "t"}, queue="q", priority=5, time_limit=9, reply_to="back",
                         shadow="s", expires=1000)  # fmt: skip
    first = sent(app)[0]
    reason = ValueError("try again")
    with Running(first), pytest.raises(Retry) as raised:
        retrying.retry(exc=reason)
    second = sent(app)[1]
    assert second.body is not first.body
    assert second.body == first.body
    assert second.due == pytest.approx(time.time() + 7, abs=5)
    assert (raised.value.exc, raised.value.when) == (reason, second.due)
    before, after = headers(first), headers(second)
    assert after.pop("eta") is not None
    assert after.pop("retries") == 1
    assert after == {name: value for name, value in before.items() if name not in ("eta", "retries")}
    assert (second.routing_key, second.priority) == ("q", 5)
    assert decode_properties(second.props)["reply_to"] == "back"


def test_retry_may_change_arguments_and_options(app: FastQ, retrying: Task[..., Any]) -> None:
    retrying.delay(1)
    with Running(sent(app)[0]):
        again = retrying.retry(
            args=(5,),
            kwargs={"y": 6},
            countdown=0,
            throw=False,
            queue="other",
            priority=9,
            headers={"more": 1},
            time_limit=3,
        )
    assert isinstance(again, Retry)
    second = sent(app)[1]
    assert body(second)[:2] == [[5], {"y": 6}]
    assert body(second)[2] == body(sent(app)[0])[2]
    found = headers(second)
    assert (second.routing_key, second.priority, found["more"], found["timelimit"]) == ("other", 9, 1, [3, None])
    assert found["argsrepr"] == "(5,)"
    with Running(sent(app)[0]), pytest.raises(TypeError, match="unknown option 'task_id'"):
        retrying.retry(task_id="x")  # type: ignore[call-arg]


def test_retry_keeps_the_callbacks_of_other_clients_and_drops_the_broker_s_headers(app: FastQ, retrying: Any) -> None:
    embed = b'{"callbacks": [{"task": "next"}], "errbacks": null, "chain": null, "chord": null}'
    message = encode_task(
        retrying.name,
        "i",
        b"[[1], {}, %b]" % embed,
        group="g",
        group_index=3,
        headers={"x-death": [{"count": 1}], "k": 1},
    )
    with Running(message):
        retrying.retry(throw=False)
        retrying.retry(args=(2,), throw=False)
    same, changed = sent(app)
    assert same.body == message.body
    assert body(changed)[2]["callbacks"] == [{"task": "next"}]
    for again in (same, changed):
        found = headers(again)
        assert (found["group"], found["group_index"], found["k"]) == ("g", 3, 1)
        assert "x-death" not in found


def test_retry_keeps_serializer_and_compression(app: FastQ, retrying: Task[..., Any]) -> None:
    app.conf.accept_content = ["json", "pickle"]
    retrying.apply_async((1,), serializer="pickle", compression="bzip2")
    first = sent(app)[0]
    call = received(first)
    request = Request.from_call(call, [1], {}, None, {})
    push_request(request)
    try:
        retrying.retry(throw=False)
        retrying.retry(throw=False, compression="zlib", serializer="json")
    finally:
        pop_request()
    same, changed = sent(app)[1:]
    assert same.body == first.body
    assert headers(same)["compression"] == "application/x-bz2"
    assert headers(changed)["compression"] == "application/x-gzip"
    assert decode_properties(changed.props)["content_type"] == "application/json"


def test_after_max_retries_the_reason_is_raised(app: FastQ, retrying: Task[..., Any]) -> None:
    retrying.delay(1)
    last = run_again(sent(app)[0], 2)
    with Running(last):
        with pytest.raises(KeyError, match="the reason"):
            retrying.retry(exc=KeyError("the reason"))
        with pytest.raises(MaxRetriesExceeded, match=r"was retried 2 times, its max_retries is 2"):
            retrying.retry()
        with pytest.raises(Retry):
            retrying.retry(max_retries=3)
    with Running(run_again(last, 500)):
        retrying.max_retries = None
        with pytest.raises(Retry):
            retrying.retry()


def test_retry_in_an_except_block_takes_the_exception_as_its_reason(app: FastQ, retrying: Task[..., Any]) -> None:
    retrying.delay(1)
    with Running(sent(app)[0]):
        try:
            raise OSError("handled")
        except OSError as error:
            assert retrying.retry(throw=False).exc is error  # noqa: PT017 - being inside the block is the point


def test_retry_outside_a_worker_raises_the_reason(app: FastQ) -> None:
    @app.task(bind=True)
    def failing(self: Task[..., Any]) -> None:
        try:
            raise ValueError("real")
        except ValueError:
            self.retry()

    with pytest.raises(ValueError, match="real"):
        failing()
    assert sent(app) == []


def test_retry_outside_a_worker_and_without_a_reason_says_where_it_was_called(app: FastQ) -> None:
    @app.task(bind=True, name="again")
    def again(self: Task[..., Any]) -> None:
        self.retry()

    for call in (again, again.retry):
        with pytest.raises(Retry, match=r"retry\(\) of task 'again' was called outside of a running task") as raised:
            call()
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    assert sent(app) == []


def test_autoretry_asks_for_the_next_run(app: FastQ) -> None:
    task = app.task(
        autoretry_for=(OSError,),
        dont_autoretry_for=FileNotFoundError,
        retry_backoff=4,
        retry_jitter=False,
        max_retries=3,
    )(add)
    task.delay(1)
    first = sent(app)[0]
    with Running(first):
        assert on_exception(task, ValueError()) is None
        assert on_exception(task, FileNotFoundError()) is None
        assert sent(app)[1:] == []
        error = OSError("down")
        again = on_exception(task, error)
    assert again is not None
    assert again.exc is error
    assert sent(app)[1].due == pytest.approx(time.time() + 4, abs=3)
    with Running(run_again(first, 2)):
        on_exception(task, error)
    assert sent(app)[2].due == pytest.approx(time.time() + 16, abs=3)
    with Running(run_again(first, 3)):
        assert on_exception(task, error) is None


def test_autoretry_takes_its_limits_from_retry_kwargs_and_class_attributes(app: FastQ) -> None:
    class Base(Task[..., Any]):
        autoretry_for = Exception
        retry_kwargs = {"max_retries": None, "countdown": 30}  # noqa: RUF012 - as users write it

    task = app.task(base=Base)(add)
    task.delay(1)
    with Running(run_again(sent(app)[0], 50)):
        assert on_exception(task, ValueError()) is not None
        for steering in (Retry(), Ignore(), Reject()):
            assert on_exception(task, steering) is None
    assert sent(app)[1].due == pytest.approx(time.time() + 30, abs=3)


def test_a_task_without_autoretry_has_no_policy(app: FastQ) -> None:
    assert app.task(add).autoretry is None


def test_backoff_doubles_to_its_bound_and_jitter_spreads_below_it() -> None:
    fixed = RetryPolicy((OSError,), backoff=2, backoff_max=10, jitter=False)
    assert [fixed.delay_s(retries) for retries in (0, 1, 2, 3, 10**9)] == [2, 4, 8, 10, 10]
    spread = RetryPolicy((OSError,), backoff=8, backoff_max=10)
    delays = [spread.delay_s(0) for _ in range(200)]
    assert all(delay is not None and 0 <= delay <= 8 for delay in delays)
    assert len(set(delays)) > 100
    assert RetryPolicy((OSError,), countdown=5).delay_s(3) == 5
    assert RetryPolicy((OSError,)).delay_s(3) is None


# --- eager runs -------------------------------------------------------------------------------------------------------


class Noting(Task[..., Any]):
    """Notes which handlers ran."""

    notes: list[Any]

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        self.notes.append(("before_start", args, kwargs, self.request.retries))

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        self.notes.append(("on_success", retval))

    def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: ExceptionInfo) -> None:
        self.notes.append(("on_failure", exc, einfo.type, str(einfo).splitlines()[-1]))

    def on_retry(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: ExceptionInfo) -> None:
        self.notes.append(("on_retry", exc))

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        self.notes.append(("after_return", status, retval, einfo is None))


@pytest.fixture
def notes() -> Iterator[list[Any]]:
    Noting.notes = []
    yield Noting.notes
    Noting.notes = []


def test_apply_runs_here_with_handlers(app: FastQ, notes: list[Any]) -> None:
    result = app.task(base=Noting)(add).apply((1,), {"y": 2}, task_id="given")
    assert type(result) is EagerResult
    assert (result.id, result.state, result.get(), result.ready()) == ("given", "SUCCESS", 3, True)
    assert notes == [("before_start", (1,), {"y": 2}, 0), ("on_success", 3), ("after_return", "SUCCESS", 3, True)]
    assert sent(app) == []


def test_an_eager_failure_is_a_result_or_is_thrown(app: FastQ, notes: list[Any]) -> None:
    error = ValueError("bad")

    @app.task(base=Noting)
    def failing() -> None:
        raise error

    result = failing.apply()
    assert (result.state, result.result, result.failed()) == ("FAILURE", error, True)
    assert result.traceback is not None
    assert "in failing" in result.traceback
    with pytest.raises(ValueError, match="bad"):
        result.get()
    assert result.get(propagate=False) is error
    assert notes[1:] == [
        ("on_failure", error, ValueError, "ValueError: bad"),
        ("after_return", "FAILURE", error, False),
    ]
    with pytest.raises(ValueError, match="bad"):
        failing.apply(throw=True)
    with app.override(task_eager_propagates=True), pytest.raises(ValueError, match="bad"):
        failing.apply()


def test_an_eager_retry_follows_at_once(app: FastQ, notes: list[Any]) -> None:
    @app.task(bind=True, base=Noting, max_retries=3)
    def flaky(self: Task[..., Any], x: int) -> int:
        if self.request.retries < 2:
            self.retry(args=(x * 10,), exc=OSError("again"))
        return x

    result = flaky.apply((1,))
    assert result.get() == 100
    assert [note[0] for note in notes].count("on_retry") == 2
    assert sent(app) == []


def test_eager_retries_end_and_autoretry_works_eagerly(app: FastQ) -> None:
    runs = []

    @app.task(autoretry_for=(OSError,), max_retries=2)
    def failing() -> None:
        runs.append(1)
        raise OSError("down")

    result = failing.apply()
    assert (result.state, len(runs)) == ("FAILURE", 3)
    with pytest.raises(OSError, match="down"):
        result.get()


@pytest.mark.parametrize(("error", "state"), [(Ignore(), "IGNORED"), (Reject("no"), "REJECTED")])
def test_steering_exceptions_end_an_eager_run_without_handlers(
    app: FastQ, notes: list[Any], error: Exception, state: str
) -> None:
    @app.task(base=Noting)
    def steering() -> None:
        raise error

    result = steering.apply()
    assert (result.state, result.get()) == (state, None)
    assert [note[0] for note in notes] == ["before_start"]


def test_always_eager_runs_what_is_sent(app: FastQ) -> None:
    @app.task(bind=True)
    def who(self: Task[..., Any]) -> Any:
        return self.request.id, self.request.is_eager, self.request.get("trace")

    with app.override(task_always_eager=True):
        assert who.delay().get()[1] is True
        assert who.apply_async(task_id="given", headers={"trace": "t"}).get() == ("given", True, "t")
        with pytest.raises(TypeError):
            who.delay(1)  # type: ignore[call-arg]
    assert sent(app) == []


def test_a_request_is_gone_after_its_run_whatever_happened(app: FastQ) -> None:
    @app.task
    def leaving() -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        leaving.apply()
    assert current() is None


# --- states -----------------------------------------------------------------------------------------------------------


def test_update_state_stores_a_state_of_the_running_call(app: FastQ) -> None:
    task = app.task(add)
    result = task.delay(1)
    with Running(sent(app)[0]):
        task.update_state(state="PROGRESS", meta={"done": 5})
    assert (result.state, result.result, result.ready()) == ("PROGRESS", {"done": 5}, False)
    task.update_state(state="OTHER", task_id="elsewhere")
    assert app.AsyncResult("elsewhere").state == "OTHER"


def test_update_state_does_nothing_where_nothing_is_stored(app: FastQ) -> None:
    @app.task(bind=True)
    def working(self: Task[..., Any]) -> None:
        self.update_state(state="PROGRESS")

    working()
    working.apply()
    silent = app.task(name="silent", ignore_result=True)(add)
    silent.delay(1)
    with Running(sent(app)[0]):
        silent.update_state(state="PROGRESS")
    store = app.store
    assert isinstance(store, RecordingStore)
    assert store.metas == {}


# --- cost -------------------------------------------------------------------------------------------------------------


def test_delay_takes_few_python_frames(app: FastQ) -> None:
    task = app.task(add)
    task.delay(1)
    frames: list[str] = []

    def count(frame: Any, event: str, arg: Any) -> None:
        if event == "call":
            frames.append(frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name)

    sys.setprofile(count)
    try:
        task.delay(2)
    finally:
        sys.setprofile(None)
    # delay, app, send, running_message, message, _body, encode, publish, _publish_once, publish, AsyncResult
    assert len(frames) <= 11, frames
