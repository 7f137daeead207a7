"""Events: what a monitor is told, in Celery's words; when it is sent, and what is kept while nobody can be told."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
import pytest

from fastq.codecs.json import decode_event
from fastq.errors import ConnectionLost, EncodeError
from fastq.settings import Settings
from fastq.wire.message import encode_properties, encode_task
from fastq.worker.remote import events as module
from fastq.worker.remote.clock import LamportClock
from fastq.worker.remote.events import FLUSH_EVENTS, HELD_EVENTS, MAX_TEXT, Events

Event = dict[str, Any]
COMMON = {"hostname", "utcoffset", "pid", "clock", "timestamp", "type"}
WORKER = COMMON | {"freq", "active", "processed", "loadavg", "sw_ident", "sw_ver", "sw_sys"}
RECEIVED = {"uuid", "name", "args", "kwargs", "root_id", "parent_id", "retries", "eta", "expires"}


class MemoryBus:
    """A bus that keeps what it is given; ``is_lost`` makes it fail as a connection that has ended does."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, Mapping[str, Any], Any]] = []
        self.is_lost = False
        self._arrived = asyncio.Event()

    async def until(self, count: int) -> None:
        """Return when that many messages were sent."""
        while len(self.messages) < count:
            self._arrived.clear()
            await self._arrived.wait()

    def publish_event(self, routing_key: str, headers: Mapping[str, Any], body: bytes) -> None:
        if self.is_lost:
            raise ConnectionLost("gone")
        self.messages.append((routing_key, headers, decode_event(body)))
        self._arrived.set()

    def events(self, prefix: str = "") -> list[Event]:
        found: list[Event] = []
        for _, _, body in self.messages:
            found += body if isinstance(body, list) else [body]
        return [event for event in found if event["type"].startswith(prefix)]


class Scene:
    """Events over a memory bus, which can go away."""

    def __init__(self, **options: Any) -> None:
        self.bus = MemoryBus()
        self.connected = True
        self.clock = LamportClock()
        settings = Settings({"worker_send_task_events": True})
        self.events = Events(
            asyncio.get_running_loop(),
            lambda: self.bus if self.connected else None,
            "w@h",
            settings,
            self.clock,
            **options,
        )

    def sent(self) -> list[Event]:
        """Return the task events sent until now."""
        self.events.flush()
        return self.bus.events("task-")

    def only(self) -> Event:
        (event,) = self.sent()
        return event


def on_loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def limited() -> None:
            await asyncio.wait_for(test(), 20)

        asyncio.run(limited())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


# -- tasks


@on_loop
async def test_a_received_task_is_told_as_its_sender_wrote_it() -> None:
    scene = Scene()
    message = encode_task(
        "proj.add", "id-1", b"[[1,2],{},{}]", argsrepr="(1, 2)", kwargsrepr="{'a': 1}", eta=1e9, expires=2e9,
        retries=2, root_id="root", parent_id="parent",
    )  # fmt: skip
    scene.events.received(message.props, message.body, "proj.add", "id-1")
    event = scene.only()
    assert event.keys() == COMMON | RECEIVED
    assert {name: event[name] for name in RECEIVED} == {
        "uuid": "id-1",
        "name": "proj.add",
        "args": "(1, 2)",
        "kwargs": "{'a': 1}",
        "root_id": "root",
        "parent_id": "parent",
        "retries": 2,
        "eta": "2001-09-09T01:46:40.000000+00:00",
        "expires": "2033-05-18T03:33:20.000000+00:00",
    }
    assert event["type"] == "task-received"


@on_loop
async def test_all_events_have_the_common_fields() -> None:
    scene = Scene()
    scene.clock.adjust(41)
    before = time.time()
    scene.events.started("id-1", 77)
    event = scene.only()
    assert (event["hostname"], event["pid"], event["clock"], event["type"]) == ("w@h", os.getpid(), 43, "task-started")
    assert before <= event["timestamp"] <= time.time()
    assert event["utcoffset"] == time.timezone / 3600 or time.daylight
    assert scene.bus.messages[0][:2] == ("task.multi", {"hostname": "w@h"})


def headers(body_type: str = "application/json", **more: Any) -> bytes:
    return encode_properties({"content_type": body_type, "headers": {"task": "t", "id": "i", **more}})


@pytest.mark.parametrize(
    ("props", "body", "expected"),
    [
        (headers(), b'[[1,"x"],{"k":null},{}]', ("(1, 'x')", "{'k': None}")),
        (headers(), b"[[],{},{}]", ("()", "{}")),
        (headers(), b'{"args":[1],"kwargs":{"a":2}}', ("(1,)", "{'a': 2}")),
        (headers(argsrepr=None, kwargsrepr=None), b"[[1],{},{}]", ("(1,)", "{}")),
        (headers(argsrepr=b"\xff", kwargsrepr="{}"), b"[[1],{},{}]", ("(1,)", "{}")),
        (headers("application/x-python-serialize"), b"\x80\x04.", ("", "")),
        (headers(compression="application/x-gzip"), b"\x1f\x8b", ("", "")),
        (headers(), b"[[1],{},{}", ("", "")),
        (headers(), b"7", ("", "")),
        (headers(), b"[" + b"[1]," * 40_000 + b"1]", ("", "")),
        (headers(argsrepr="(1,)", kwargsrepr="{}"), b"not looked at", ("(1,)", "{}")),
    ],
)
def test_arguments_that_the_sender_has_not_described_come_from_the_body(
    props: bytes, body: bytes, expected: tuple[str, str]
) -> None:
    async def run() -> None:
        scene = Scene()
        scene.events.received(props, body, "t", "i")
        event = scene.only()
        assert (event["args"], event["kwargs"]) == expected

    asyncio.run(run())


@on_loop
async def test_arguments_are_shown_within_bounds() -> None:
    scene = Scene()
    scene.events.received(headers(), orjson.dumps([["x" * 50_000], {}, {}]), "t", "i")
    scene.events.received(headers(argsrepr="y" * 1_000_000, kwargsrepr="{}"), b"", "t", "i")
    assert [len(event["args"]) < MAX_TEXT + 10 for event in scene.sent()] == [True, True]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("2030-01-31T12:00:00+00:00", "2030-01-31T12:00:00+00:00"),
        (1.5e9, "2017-07-14T02:40:00.000000+00:00"),
        (b"\xff", None),
        (float("nan"), None),
        (-1, None),
        (1e300, None),
    ],
)
def test_moments_are_iso_8601_whatever_a_client_writes(header: object, expected: str | None) -> None:
    async def run() -> None:
        scene = Scene()
        scene.events.received(headers(eta=header), b"[[],{},{}]", "t", "i")
        assert scene.only()["eta"] == expected

    asyncio.run(run())


@on_loop
async def test_seconds_from_now_become_a_moment() -> None:
    scene = Scene()
    scene.events.received(headers(expires=60), b"[[],{},{}]", "t", "i")
    assert scene.only()["expires"].startswith(time.strftime("%Y-%m-%dT", time.gmtime(time.time() + 60)))


@on_loop
async def test_of_a_task_that_comes_too_late_only_the_end_is_told() -> None:
    scene = Scene()
    scene.events.received(headers(expires="2020-01-31T12:00:00+00:00"), b"[[],{},{}]", "t", "i")
    scene.events.revoked("i", terminated=False, signum=None, expired=True)
    assert scene.only()["type"] == "task-revoked"


@pytest.mark.parametrize("props", [b"", b"\xff\xff\xff", headers(root_id=b"\xff", retries="many")])
def test_headers_that_make_no_sense_do_no_harm(props: bytes) -> None:
    async def run() -> None:
        scene = Scene()
        scene.events.received(props, b"", "t", "i")
        event = scene.only()
        assert (event["root_id"], event["retries"], event["args"]) == (None, 0, "")

    asyncio.run(run())


RAISED = '{"exception": "ValueError(1)", "traceback": "Traceback"}'


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("SUCCESS", '{"result": "3"}', [{"type": "task-succeeded", "result": "3", "runtime": 0.5}]),
        ("SUCCESS", None, [{"type": "task-succeeded", "result": None, "runtime": 0.5}]),
        ("FAILURE", RAISED, [{"type": "task-failed", "exception": "ValueError(1)", "traceback": "Traceback"}]),
        ("FAILURE", "{", [{"type": "task-failed", "exception": None, "traceback": None}]),
        ("FAILURE", '["x"]', [{"type": "task-failed", "exception": None, "traceback": None}]),
        ("RETRY", RAISED, [{"type": "task-retried", "exception": "ValueError(1)", "traceback": "Traceback"}]),
        ("REJECTED", '{"requeue": true}', [{"type": "task-rejected", "requeue": True}]),
        ("REJECTED", '{"requeue": false}', [{"type": "task-rejected", "requeue": False}]),
        (
            "REJECTED",
            '{"requeue": false, "exception": "reject", "traceback": "Traceback"}',
            [
                {"type": "task-failed", "exception": "reject", "traceback": "Traceback"},
                {"type": "task-rejected", "requeue": False},
            ],
        ),
        ("IGNORED", None, []),
    ],
)
def test_the_end_of_a_call_is_told_by_its_state(state: str, reason: str | None, expected: list[Event]) -> None:
    async def run() -> None:
        scene = Scene()
        scene.events.finished("id-1", "t", state, reason, 0.5)
        told = [{name: event[name] for name in event.keys() - COMMON | {"type"}} for event in scene.sent()]
        assert told == [{"uuid": "id-1", **each} for each in expected]

    asyncio.run(run())


@on_loop
async def test_the_main_process_tells_of_what_it_ends_itself() -> None:
    scene = Scene()
    scene.events.failed("a", "TimeLimitExceeded(1)")
    scene.events.revoked("b", terminated=True, signum=15, expired=False)
    scene.events.cancelled("c")
    failed, revoked, cancelled = scene.sent()
    assert (failed["type"], failed["exception"], failed["traceback"]) == ("task-failed", "TimeLimitExceeded(1)", None)
    assert (revoked["terminated"], revoked["signum"], revoked["expired"]) == (True, 15, False)
    assert (cancelled["type"], cancelled["uuid"]) == ("task-cancelled", "c")


@on_loop
async def test_a_long_traceback_keeps_its_beginning_and_its_end() -> None:
    scene = Scene()
    scene.events.failed("a", "E()", "Traceback" + "x" * 10 * MAX_TEXT + "RecursionError")
    text = scene.only()["traceback"]
    assert len(text) < MAX_TEXT + 10
    assert text.startswith("Traceback")
    assert text.endswith("RecursionError")


def kinds(events: list[Event]) -> list[tuple[str, str]]:
    return [(event["type"].removeprefix("task-"), event["uuid"]) for event in events]


RETRIED = '{"exception": "E()", "traceback": "T"}'


@on_loop
async def test_a_retry_that_overtakes_the_report_of_the_first_run_is_told_behind_it() -> None:
    """A monitor takes the state that it hears last: it must not be RETRY for a task that has ended."""
    scene = Scene()
    message = encode_task("t", "a", b"[[],{},{}]")
    for _ in range(2):
        scene.events.received(message.props, message.body, "t", "a")
        scene.events.started("a", 1)
        scene.events.started("b", 1)
    scene.events.finished("a", "t", "SUCCESS", '{"result": "1"}', 0.1)
    assert kinds(scene.sent()) == [("received", "a"), ("started", "a"), ("started", "b"), ("started", "b")]
    scene.events.finished("a", "t", "RETRY", RETRIED, 0.1)
    told = scene.sent()
    assert kinds(told)[4:] == [("retried", "a"), ("received", "a"), ("started", "a"), ("succeeded", "a")]
    assert [event["clock"] for event in told] == sorted(event["clock"] for event in told)
    scene.events.started("a", 1)
    assert kinds(scene.sent())[-1] == ("started", "a")


@on_loop
async def test_a_retry_after_the_report_waits_for_nothing() -> None:
    scene = Scene()
    message = encode_task("t", "a", b"[[],{},{}]")
    for state in ("RETRY", "IGNORED", "SUCCESS"):
        scene.events.received(message.props, message.body, "t", "a")
        scene.events.started("a", 1)
        scene.events.finished("a", "t", state, RETRIED, 0.1)
    expected = ["received", "started", "retried", "received", "started", "received", "started", "succeeded"]
    assert [kind for kind, _ in kinds(scene.sent())] == expected


def test_a_report_that_never_comes_holds_up_nothing_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_WAIT_S", 0.05)

    async def run() -> None:
        scene = Scene()
        message = encode_task("t", "a", b"[[],{},{}]")
        scene.events.started("a", 1)
        scene.events.received(message.props, message.body, "t", "a")
        assert kinds(scene.sent()) == [("started", "a")]
        await asyncio.wait_for(scene.bus.until(2), 5)
        assert kinds(scene.sent()) == [("started", "a"), ("received", "a")]

    asyncio.run(run())


@on_loop
async def test_what_waits_for_a_report_is_told_at_the_end() -> None:
    scene = Scene()
    message = encode_task("t", "a", b"[[],{},{}]")
    scene.events.started("a", 1)
    scene.events.received(message.props, message.body, "t", "a")
    scene.events.stop()
    assert kinds(scene.bus.events("task-")) == [("started", "a"), ("received", "a")]


# -- switching


@on_loop
async def test_nothing_is_told_of_tasks_while_task_events_are_off() -> None:
    switched: list[bool] = []
    scene = Scene(on_switch=switched.append)
    assert scene.events.disable()
    assert not scene.events.disable()
    message = encode_task("t", "i", b"[[],{},{}]")
    scene.events.received(message.props, message.body, "t", "i")
    scene.events.started("i", 1)
    scene.events.finished("i", "t", "SUCCESS", None, 0.1)
    scene.events.failed("i", "E()")
    scene.events.revoked("i", False, None, True)
    scene.events.cancelled("i")
    scene.events.send("task-mine", uuid="i")
    scene.events.send("custom", x=1)
    assert [event["type"] for event in scene.bus.events()] == ["custom"]
    assert scene.events.enable()
    assert not scene.events.enable()
    scene.events.started("i", 1)
    assert scene.only()["type"] == "task-started"
    assert switched == [False, True]


@on_loop
async def test_task_events_are_off_unless_the_setting_says_otherwise() -> None:
    events = Events(asyncio.get_running_loop(), lambda: None, "w@h", Settings(), LamportClock())
    assert not events.enabled


# -- the worker itself


@on_loop
async def test_a_worker_comes_beats_and_goes() -> None:
    scene = Scene(heartbeat_s=0.02, counts=lambda: (3, 70))
    scene.events.connected()
    await scene.bus.until(4)
    scene.events.stop()
    told = scene.bus.messages
    assert [key for key, _, _ in told] == ["worker.online", *["worker.heartbeat"] * (len(told) - 2), "worker.offline"]
    for _, _, event in told:
        assert event.keys() == WORKER
        assert (event["freq"], event["active"], event["processed"]) == (0.02, 3, 70)
        assert (event["sw_ident"], event["sw_sys"]) == ("fastq", "Linux")
        assert [type(load) for load in event["loadavg"]] == [float] * 3
    count = len(told)
    await asyncio.sleep(0.1)
    assert len(scene.bus.messages) == count, "it beats after its end"


@on_loop
async def test_it_comes_again_on_each_connection_and_beats_once() -> None:
    scene = Scene(heartbeat_s=0.2)
    scene.events.connected()
    scene.connected = False
    scene.events.heartbeat()
    scene.connected = True
    scene.events.connected()
    await asyncio.sleep(0.3)
    scene.events.stop()
    types = [event["type"] for event in scene.bus.events()]
    assert types == ["worker-online", "worker-online", "worker-heartbeat", "worker-offline"]


@on_loop
async def test_without_heartbeat_only_tasks_are_told() -> None:
    scene = Scene(heartbeat_s=None)
    scene.events.connected()
    scene.events.heartbeat()
    scene.events.started("i", 1)
    scene.events.stop()
    assert [event["type"] for event in scene.bus.events()] == ["task-started"]


@on_loop
async def test_a_request_for_a_heartbeat_is_met_at_once() -> None:
    scene = Scene(heartbeat_s=60)
    scene.events.heartbeat()
    assert [event["type"] for event in scene.bus.events()] == ["worker-heartbeat"]


# -- custom events


@on_loop
async def test_an_event_of_the_application_s_own_goes_out_under_its_name() -> None:
    scene = Scene()
    scene.events.send("billing-run-done", customers=7)
    ((key, _, event),) = scene.bus.messages
    assert key == "billing.run.done"
    assert event.keys() == COMMON | {"customers"}
    scene.events.send("task-progress", uuid="i", percent=40)
    assert scene.only()["percent"] == 40


@on_loop
async def test_what_only_pythons_json_reads_goes_out_as_celery_writes_it() -> None:
    odd = [float("nan"), {"x": float("inf")}, "caf\udce9"]
    scene = Scene()
    scene.events.send("custom", x=odd)
    scene.events.send("task-custom", x=odd)
    scene.events.flush()
    assert [repr(event["x"]) for event in scene.bus.events()] == [repr(odd)] * 2
    scene.bus.messages.clear()
    message = encode_task("t", "caf\udce9", rb'[["\udce9", NaN], {}, {}]', argsrepr="('caf\udce9',)")
    scene.events.received(message.props, message.body, "t", "caf\udce9")
    assert (found := scene.only())["args"] == "('caf\udce9',)"
    assert found["uuid"] == "caf\udce9"


@on_loop
async def test_a_field_that_json_cannot_hold_is_the_sender_s_error() -> None:
    scene = Scene()
    with pytest.raises(EncodeError, match=r"'custom' cannot be written as JSON"):
        scene.events.send("custom", x=object())
    assert scene.bus.messages == []


# -- collecting and keeping


@on_loop
async def test_events_are_sent_together_and_soon() -> None:
    scene = Scene()
    for number in range(5):
        scene.events.started(f"id-{number}", 1)
    assert scene.bus.messages == []
    await scene.bus.until(1)
    ((key, _, body),) = scene.bus.messages
    assert (key, [event["uuid"] for event in body]) == ("task.multi", [f"id-{number}" for number in range(5)])


@on_loop
async def test_a_full_list_is_sent_at_once_and_in_order() -> None:
    scene = Scene()
    for number in range(FLUSH_EVENTS * 2 + 1):
        scene.events.started(str(number), 1)
    assert [len(body) for _, _, body in scene.bus.messages] == [FLUSH_EVENTS] * 2
    told = scene.sent()
    assert [event["uuid"] for event in told] == [str(number) for number in range(FLUSH_EVENTS * 2 + 1)]
    assert [event["clock"] for event in told] == list(range(1, FLUSH_EVENTS * 2 + 2))


@pytest.mark.parametrize("fails", [False, True])
def test_task_events_wait_for_the_next_connection(fails: bool) -> None:
    async def run() -> None:
        scene = Scene(heartbeat_s=60)
        scene.bus.is_lost, scene.connected = fails, fails
        for number in range(FLUSH_EVENTS + 5):
            scene.events.started(str(number), 1)
        scene.events.flush()
        scene.events.heartbeat()
        assert scene.bus.messages == []
        scene.bus.is_lost, scene.connected = False, True
        scene.events.connected()
        scene.events.started("last", 1)
        assert [event["uuid"] for event in scene.sent()] == [*map(str, range(FLUSH_EVENTS + 5)), "last"]
        assert [event["type"] for event in scene.bus.events("worker")] == ["worker-online"]
        assert scene.events.dropped == 0
        scene.events.stop()

    asyncio.run(run())


@on_loop
async def test_what_is_kept_is_bounded_and_the_oldest_goes_first() -> None:
    scene = Scene()
    scene.connected = False
    for number in range(HELD_EVENTS + 5 * FLUSH_EVENTS):
        scene.events.started(str(number), 1)
    assert scene.events.dropped == 5 * FLUSH_EVENTS
    scene.connected = True
    told = scene.sent()
    assert len(told) == HELD_EVENTS
    assert told[0]["uuid"] == str(5 * FLUSH_EVENTS)


@on_loop
async def test_what_is_kept_is_bounded_in_bytes_too() -> None:
    scene = Scene()
    scene.connected = False
    count = 0
    while scene.events.dropped == 0:
        scene.events.failed("i", "E()", "x" * MAX_TEXT)
        count += 1
        assert count * MAX_TEXT < 2 * module.HELD_BYTES, "nothing is ever dropped"
    assert count * MAX_TEXT > module.HELD_BYTES * 0.9
    scene.connected = True
    assert len(scene.sent()) < count


@on_loop
async def test_an_event_costs_little() -> None:
    """Not a benchmark: a bound that only a change of order breaks."""
    scene = Scene()
    message = encode_task("proj.add", "id-1", b"[[1,2],{},{}]", argsrepr="(1, 2)")
    start = time.process_time()
    for _ in range(5000):
        scene.events.received(message.props, message.body, "proj.add", "id-1")
        scene.events.started("id-1", 1)
        scene.events.finished("id-1", "proj.add", "SUCCESS", '{"result":"3"}', 0.001)
    scene.events.flush()
    spent_s = time.process_time() - start
    assert spent_s / 15_000 < 50e-6
    assert len(scene.bus.messages) == 150
