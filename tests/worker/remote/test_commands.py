"""Remote control commands: what they do, and that their replies have the form of a stock Celery worker's.

The worker behind them is made of plain values with real messages; its replies are laid beside those that a Celery
worker gives in the same run, field by field.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import pickle
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastq.brokers import open_blocking_bus
from fastq.settings import Settings
from fastq.worker.remote.commands import COMMANDS, commands_of
from fastq.worker.remote.commands.command import Command
from fastq.worker.remote.commands.memory import resident
from fastq.worker.remote.commands.tasks import per_second
from fastq.worker.report import broker_info, configuration
from tests.support.control_node import CeleryWorker, View, row
from tests.support.servers import RabbitMQ, wait_until

NOW = 1_700_000_000.0


@pytest.fixture
def view() -> View:
    view = View(Settings({"broker_url": "amqp://me:secret@host:5673/v", "task_default_queue": "celery"}), "fastq@here")
    view.core.rows["active"] = [row("proj.nap", "a1", [60], pid=11, started=NOW, acknowledged=True, priority=5)]
    view.core.rows["reserved"] = [row("proj.nap", "r1", [60]), row("proj.add", "r2", [1, 2])]
    view.core.rows["scheduled"] = [row("proj.add", "s1", [1, 2], eta=NOW + 0.25)]
    return view


def run(view: View, name: str, **arguments: Any) -> Any:
    reply = COMMANDS[name].function(view, **arguments)
    return asyncio.run(reply) if inspect.isawaitable(reply) else reply


# -- messages


def test_a_running_call_is_described(view: View) -> None:
    assert run(view, "active") == [
        {
            "id": "a1",
            "name": "proj.nap",
            "args": [60],
            "kwargs": {},
            "type": "proj.nap",
            "hostname": "fastq@here",
            "time_start": NOW,
            "acknowledged": True,
            "delivery_info": {"exchange": "", "routing_key": "celery", "priority": 5, "redelivered": False},
            "worker_pid": 11,
        }
    ]


def test_arguments_are_text_when_asked_for(view: View) -> None:
    (call,) = run(view, "active", safe=True)
    assert (call["args"], call["kwargs"]) == ("(60,)", "{}")


def test_waiting_messages_are_described(view: View) -> None:
    assert [(each["id"], each["worker_pid"], each["time_start"]) for each in run(view, "reserved")] == [
        ("r1", None, None),
        ("r2", None, None),
    ]
    (waiting,) = run(view, "scheduled")
    assert (waiting["eta"], waiting["priority"]) == ("2023-11-14T22:13:20.250000+00:00", 6)
    assert waiting["request"]["id"] == "s1"


def test_a_task_is_found_wherever_it_is(view: View) -> None:
    found = run(view, "query_task", ids=["a1", "r2", "s1", "gone"])
    assert {task_id: state for task_id, (state, _) in found.items()} == {
        "a1": "active",
        "r2": "reserved",
        "s1": "scheduled",
    }
    assert list(run(view, "query_task", ids="s1")) == ["s1"]


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (pickle.dumps(((Bomb(),), {}, {})), {"content_type": "application/x-python-serialize"}),
        (b"{", {}),
        (b"7", {}),
        (b"\xff", {"content_type": "application/x-unknown"}),
        (b"[[1], {}, {}]" + b" " * 100_000, {}),
        (zlib.compress(b"[[1], {}, {}]" + b" " * 10_000_000), {"compression": "gzip"}),
        (b"no zlib", {"compression": "gzip"}),
    ],
)
def test_a_body_that_is_better_not_decoded_is_described_by_its_sender(
    view: View, body: bytes, options: dict[str, Any]
) -> None:
    view.core.rows["active"] = [row("proj.nap", "a1", ["as", "sent"], body=body, **options)]
    (call,) = run(view, "active")
    assert (call["args"], call["kwargs"]) == ("('as', 'sent')", "{}")


def test_a_compressed_body_and_one_of_protocol_1_are_read(view: View) -> None:
    view.core.rows["active"] = [
        row("proj.nap", "a1", body=zlib.compress(b"[[1], {}, {}]"), compression="gzip"),
        row("proj.nap", "a2", body=b'{"args": [1], "kwargs": {"x": 2}}'),
    ]
    assert [(each["args"], each["kwargs"]) for each in run(view, "active")] == [([1], {}), ([1], {"x": 2})]


def test_properties_that_cannot_be_read_leave_the_rest(view: View) -> None:
    view.core.rows["active"] = [{**row("proj.nap", "a1", [1]), "props": b"\xff\xff\xff"}]
    (call,) = run(view, "active")
    assert (call["id"], call["args"]) == ("a1", "()")


# -- revoking


def test_revoked_ids_are_known_to_the_core(view: View) -> None:
    assert view.core.revoked is None
    assert run(view, "revoke", task_id="x") == {"ok": "tasks {'x'} flagged as revoked"}
    assert "x" in view.core.revoked
    assert run(view, "revoked") == ["x"]
    assert view.done == [("mark_revoked", "x")]


def test_terminating_names_what_was_known(view: View) -> None:
    assert run(view, "revoke", task_id=["a1", "r1", "x"], terminate=True, signal="KILL") == {"ok": "terminate: a1, r1"}
    assert ("terminate", ["a1", "r1", "x"], 9) in view.done
    assert ("mark_revoked", "r1", "x") in view.done
    assert run(view, "terminate", signal="SIGUSR1", task_id=["nobody"]) == {"ok": "terminate: tasks unknown"}
    assert run(view, "revoked") == ["a1", "r1", "x", "nobody"]


@pytest.mark.parametrize("signal", ["NOSUCH", 9999, "9", 3.5])
def test_a_signal_that_is_none_changes_nothing(view: View, signal: Any) -> None:
    with pytest.raises(ValueError):
        run(view, "revoke", task_id="a1", terminate=True, signal=signal)
    assert view.core.revoked is None
    assert view.done == []


@pytest.mark.parametrize("task_id", [5, [5], {"a": 1}, [None]])
def test_an_id_that_is_no_text_is_refused(view: View, task_id: Any) -> None:
    with pytest.raises(TypeError, match="is no task id"):
        run(view, "revoke", task_id=task_id)


def test_stamped_tasks_are_revoked_and_ended(view: View) -> None:
    stamps = {"stamped_headers": ["crew"], "stamps": {"crew": ["red", "blue"]}}
    view.core.rows["active"] = [row("proj.nap", "a1", headers=stamps), row("proj.nap", "a2")]
    view.core.rows["reserved"] = [row("proj.nap", "r1", headers=stamps), row("proj.nap", "r2")]
    assert run(view, "revoke_by_stamped_headers", headers={"crew": "red"}) == {
        "ok": "headers {'crew': 'red'} flagged as revoked, but not terminated"
    }
    assert run(view, "revoked") == ["r1"]
    assert "r1" in view.core.revoked
    later = row("proj.nap", "l1", headers=stamps)
    assert view.revocations.see("l1", later["props"])
    assert not view.revocations.see("l2", row("proj.nap", "l2")["props"])
    assert run(view, "revoked") == ["r1", "l1"]
    ended = run(view, "revoke_by_stamped_headers", headers=["crew=blue", "x=y"], terminate=True)
    assert ended == {"ok": "headers {'crew': {'blue'}} revoked"}
    assert ("terminate", ["a1"], 15) in view.done
    assert run(view, "revoke_by_stamped_headers", headers={"x": ["y"]}, terminate=True) == {
        "ok": "headers {'x': ['y']} were not terminated"
    }


# -- tasks


def test_limits_of_a_task_are_changed(view: View) -> None:
    options = view.core.tasks[b"proj.add"]
    assert run(view, "time_limit", task_name="proj.add", soft=1, hard=2.5) == {"ok": "time limits set successfully"}
    assert (options.soft_time_limit, options.time_limit) == (1, 2.5)
    assert run(view, "time_limit", task_name="proj.add") == {"ok": "time limits set successfully"}
    assert (options.soft_time_limit, options.time_limit) == (0, 0)
    assert run(view, "time_limit", task_name="nope", hard=2) == {"error": "unknown task"}
    assert run(view, "rate_limit", task_name="proj.add", rate_limit="120/m") == {
        "ok": "new rate limit set successfully"
    }
    assert options.rate_limit == 2
    assert run(view, "rate_limit", task_name="proj.add", rate_limit=0) == {"ok": "rate limit disabled successfully"}
    assert options.rate_limit == 0
    assert run(view, "rate_limit", task_name="nope", rate_limit="1/s") == {"error": "unknown task"}
    assert "error" in run(view, "rate_limit", task_name="proj.add", rate_limit="x/y")


@pytest.mark.parametrize(("rate", "expected"), [("10/s", 10), ("60/m", 1), ("36/h", 0.01), ("5", 5), (2, 2), (None, 0)])
def test_a_rate_is_read(rate: Any, expected: float) -> None:
    assert per_second(rate) == pytest.approx(expected)


@pytest.mark.parametrize("rate", ["1/x", "a/s", "-1/s", "nan", "inf/s"])
def test_what_is_no_rate_is_refused(rate: str) -> None:
    with pytest.raises(ValueError):
        per_second(rate)


def test_tasks_are_listed_with_attributes(view: View) -> None:
    assert run(view, "registered") == ["proj.add", "proj.nap [rate_limit=100/m]"]
    assert run(view, "registered", taskinfoitems=["max_retries", "_x", "name"])[0] == (
        "proj.add [max_retries=3 name=proj.add]"
    )
    assert run(view, "registered", builtins=True)[0] == "celery.chord"
    run(view, "rate_limit", task_name="proj.add", rate_limit="7/h")
    assert run(view, "registered")[0] == "proj.add [rate_limit=7/h]"


def test_a_list_of_tasks_has_a_bound(view: View) -> None:
    asked = ["name"] * 10_000 + [f"attribute{number}" for number in range(10_000)] + ["max_retries"]
    assert run(view, "registered", taskinfoitems=asked)[0] == "proj.add [name=proj.add]"
    run(view, "rate_limit", task_name="proj.add", rate_limit="1" * 200 + "." + "0" * 1_000_000)
    assert len(run(view, "registered")[0]) < 2_000


# -- pool, queues, events


def test_the_pool_is_changed(view: View) -> None:
    assert run(view, "pool_grow", n=3) == {"ok": "pool will grow"}
    assert run(view, "pool_shrink") == {"ok": "pool will shrink"}
    assert view.done == [("grow", 3), ("shrink", 1)]
    with pytest.raises(ValueError, match="Pool restarts not enabled"):
        run(view, "pool_restart")
    with pytest.raises(ValueError, match="Autoscale not enabled"):
        run(view, "autoscale", max=3)


@pytest.mark.parametrize("n", [0, -1, 10**9, "3", True, None])
def test_a_size_that_makes_no_sense_is_refused(view: View, n: Any) -> None:
    with pytest.raises(ValueError, match="expected 1 to 1024"):
        run(view, "pool_grow", n=n)
    assert view.done == []


def test_a_pool_that_scales_itself_is_left_alone(view: View) -> None:
    view.autoscale = SimpleNamespace(min=1, max=4, set=lambda high, low: (high or 4, low or 1))
    assert "not supported with autoscale" in run(view, "pool_grow")["error"]
    assert run(view, "autoscale", max=9) == {"ok": "autoscale now max=9 min=1"}
    assert run(view, "stats")["autoscaler"] == {"max": 4, "min": 1, "current": 2, "qty": 2}


def test_the_pool_is_restarted_when_that_is_allowed() -> None:
    view = View(Settings({"broker_url": "amqp://", "worker_pool_restarts": True}), "fastq@here")
    assert run(view, "pool_restart") == {"ok": "reload started"}
    assert view.done == [("restart",)]
    with pytest.raises(ValueError, match="not loaded again"):
        run(view, "pool_restart", reload=True)


def test_queues_are_added_and_cancelled(view: View) -> None:
    assert run(view, "add_consumer", queue="foo") == {"ok": "add consumer foo"}
    assert run(view, "add_consumer", queue="foo") == {"ok": "add consumer foo"}
    reply = run(view, "add_consumer", queue="bar", exchange="ex", exchange_type="topic", routing_key="b.#")
    assert reply == {"ok": "add consumer bar"}
    assert [
        (each["name"], each["exchange"]["name"], each["exchange"]["type"], each["routing_key"])
        for each in run(view, "active_queues")
    ] == [("celery", "celery", "direct", "celery"), ("foo", "foo", "direct", "foo"), ("bar", "ex", "topic", "b.#")]
    assert run(view, "cancel_consumer", queue="foo") == {"ok": "no longer consuming from foo"}
    assert run(view, "cancel_consumer", queue="nosuch") == {"ok": "no longer consuming from nosuch"}
    assert [each["name"] for each in run(view, "active_queues")] == ["celery", "bar"]


def test_without_a_broker_there_are_no_queues(view: View) -> None:
    view.consumer = None
    assert run(view, "active_queues") == []


def test_events_are_switched(view: View) -> None:
    assert run(view, "enable_events") == {"ok": "task events enabled"}
    assert run(view, "enable_events") == {"ok": "task events already enabled"}
    assert run(view, "disable_events") == {"ok": "task events disabled"}
    assert run(view, "disable_events") == {"ok": "task events already disabled"}
    run(view, "heartbeat")
    assert view.events.heartbeats == 1
    view.events = None
    assert run(view, "enable_events") == {"error": "event dispatcher unavailable"}
    run(view, "heartbeat")


# -- the worker as a whole


def test_neighbours_exchange_what_is_revoked(view: View) -> None:
    run(view, "revoke", task_id="mine")
    reply = run(view, "hello", from_node="celery@there", revoked=["theirs", 7])
    assert reply["revoked"] == ["mine", "theirs"]
    assert reply["clock"] == view.clock.value == 1
    assert "theirs" in view.core.revoked
    assert run(view, "hello", from_node="fastq@here", instance=view.instance, revoked=["x"]) is None
    assert "x" not in view.core.revoked


@pytest.mark.parametrize("command", ["hello", "ping"])
def test_a_namesake_s_question_is_told_from_one_s_own(
    view: View, command: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(view, command, from_node="fastq@here", instance=view.instance)
    run(view, command, from_node="celery@there")
    assert "another worker" not in caplog.text
    for who in ({}, {"instance": "other"}):  # Celery's workers have none
        caplog.clear()
        run(view, command, from_node="fastq@here", **who)
        assert caplog.text.count("another worker is named fastq@here too") == 1


def test_shutdown_is_a_warm_stop(view: View) -> None:
    assert run(view, "shutdown") is None
    assert view.done == [("stop", "warm")]


def test_passwords_are_not_shown(view: View) -> None:
    settings = Settings(
        {
            "broker_url": "amqp://me:topsecret@host//;amqp://me:topsecret@other//",
            "broker_transport_options": {"sentinel_kwargs": {"password": "topsecret"}, "visibility_timeout": 5},
            "redis_password": "topsecret",
        }
    )
    settings.freeze()
    shown = json.dumps([configuration(settings, with_defaults=True), configuration(settings), broker_info(settings)])
    assert "topsecret" not in shown
    assert "visibility_timeout" in shown


def test_every_setting_is_listed_when_asked_for(view: View) -> None:
    assert "broker_url" in run(view, "conf")
    assert "worker_concurrency" not in run(view, "conf")
    assert run(view, "conf", with_defaults=True)["worker_prefetch_multiplier"] == 4
    json.dumps(run(view, "conf", with_defaults=True))


def test_memory_is_sampled_and_dumped(view: View) -> None:
    first = run(view, "memsample")
    assert first.endswith("MB")
    assert run(view, "memdump").startswith(f"- rss (sample):\n-    > {first},\n- rss (end): ")
    assert run(view, "memdump").startswith("- rss (end): ")
    assert float(resident()[:-2]) > 1
    if importlib.util.find_spec("objgraph") is None:
        with pytest.raises(ImportError, match="Requires the objgraph library"):
            run(view, "objgraph")


def test_a_drawing_of_objects_has_a_bound(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int]] = []

    class Drawing:
        """What is called of the library."""

        def by_type(self, name: str) -> list[str]:
            return [name] * 5_000

        def show_backrefs(self, objects: list[str], max_depth: int, **_: object) -> None:
            drawn.append((len(objects), max_depth))

    monkeypatch.setitem(sys.modules, "objgraph", Drawing())
    for asked in ({}, {"num": 10**9, "max_depth": 10**9}, {"num": -1, "max_depth": -1}):
        Path(run(view, "objgraph", **asked)["filename"]).unlink()
    assert drawn == [(200, 10), (1000, 20), (0, -1)]


# -- beside a stock Celery worker


@pytest.fixture(scope="module")
def celery_replies(rabbitmq: RabbitMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a stock worker answers to every inspect command while it runs and holds tasks."""
    vhost = rabbitmq.new_vhost()
    url = rabbitmq.url(vhost)
    worker = CeleryWorker(tmp_path_factory.mktemp("celery"), url, "stock@here", "-c", "1")
    bus = open_blocking_bus(url, Settings({"broker_url": url}))

    def ask(name: str, **arguments: Any) -> Any:
        return dict(bus.ask(name, arguments, 20.0, ["stock@here"]))["stock@here"]

    try:
        send(url)
        wait_until(
            lambda: bool(ask("active") and ask("reserved") and ask("scheduled")),
            30,
            lambda: AssertionError(worker.log()),
        )
        replies = {name: ask(name) for name in ("ping", "report", "conf", "clock", "stats", "active", "reserved")}
        replies |= {name: ask(name) for name in ("scheduled", "revoked", "registered", "active_queues", "memsample")}
        replies |= {name: ask(name) for name in ("memdump", "dump_active", "dump_tasks")}
        replies["hello"] = ask("hello", from_node="x@y")
        replies["query_task"] = ask("query_task", ids=[replies["active"][0]["id"]])
        yield replies
    finally:
        bus.close()
        worker.stop()
        rabbitmq.delete_vhost(vhost)


def send(url: str) -> None:
    """Send what the stock worker is to hold: a running task, a waiting one, one for later."""
    from fastq import FastQ

    app = FastQ("sender", broker=url)
    for _ in range(2):
        app.send_task("proj.nap", [60])
    app.send_task("proj.add", [1, 2], countdown=1000)


def shape(value: Any, path: str = "") -> set[tuple[str, str]]:
    """Return the path of every leaf with its kind; text is text, all numbers are alike, lists are their first item."""
    if isinstance(value, dict):
        found = {(f"{path}{{}}", "")}
        for key, each in value.items():
            found |= shape(each, f"{path}.{key}")
        return found
    if isinstance(value, list):
        return {(f"{path}[]", "")} | (shape(value[0], f"{path}[0]") if value else set())
    kind = "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__
    return {(path, kind)}


@pytest.mark.rabbitmq
@pytest.mark.parametrize(
    "name", ["ping", "report", "clock", "active", "reserved", "scheduled", "revoked", "registered", "active_queues",
             "memsample", "memdump", "dump_active", "dump_tasks", "hello"],
)  # fmt: skip
def test_a_reply_has_the_shape_of_celery_s(view: View, celery_replies: dict[str, Any], name: str) -> None:
    arguments = {"from_node": "x@y"} if name == "hello" else {}
    assert shape(json.loads(json.dumps(run(view, name, **arguments)))) == shape(celery_replies[name])


@pytest.mark.rabbitmq
def test_the_statistics_have_the_shape_of_celery_s(view: View, celery_replies: dict[str, Any]) -> None:
    view.core.tasks[b"proj.nap"] = SimpleNamespace(name="proj.nap", runs=3)  # type: ignore[assignment]
    ours, theirs = json.loads(json.dumps(run(view, "stats"))), celery_replies["stats"]
    assert ours["total"] == {"proj.nap": 3}
    assert shape(ours) == shape(theirs)
    assert isinstance(ours["uptime"], int)
    assert ours["broker"]["virtual_host"] == "v"


@pytest.mark.rabbitmq
def test_a_query_has_the_shape_of_celery_s(view: View, celery_replies: dict[str, Any]) -> None:
    (theirs,) = celery_replies["query_task"].values()
    (ours,) = run(view, "query_task", ids=["a1"]).values()
    assert ours[0] == theirs[0] == "active"
    assert shape(ours[1]) == shape(theirs[1])


@pytest.mark.rabbitmq
def test_settings_have_celery_s_names(view: View, celery_replies: dict[str, Any]) -> None:
    assert {"broker_url", "result_backend"} <= configuration(view.settings).keys()
    assert "broker_url" in celery_replies["conf"]
    assert celery_replies["conf"]["broker_url"].count("*") == 8


def test_every_command_of_celery_s_is_there_with_its_arguments() -> None:
    from celery.worker.control import Panel

    assert COMMANDS.keys() == Panel.data.keys()
    for name, meta in Panel.meta.items():
        ours = COMMANDS[name]
        theirs = (meta.type, meta.alias or "", meta.signature or "", meta.variadic or "", meta.visible)
        assert (ours.kind, ours.alias, ours.signature, ours.variadic, ours.is_visible) == theirs, name
        assert [argument for argument, _ in ours.arguments] == [argument for argument, _ in meta.args or ()], name
        assert name == "report" or ours.help == meta.help.rstrip("."), name


def test_hidden_commands_are_not_listed() -> None:
    assert "hello" not in commands_of("inspect")
    assert list(commands_of("control")) == sorted(commands_of("control"))
    assert all(isinstance(each, Command) and each.help for each in commands_of("inspect").values())


def test_times_are_bounded_for_many_messages(view: View) -> None:
    view.core.rows["reserved"] = [row("proj.add", str(number), [number]) for number in range(1000)]
    start = time.monotonic()
    assert len(run(view, "reserved")) == 1000
    assert time.monotonic() - start < 2
