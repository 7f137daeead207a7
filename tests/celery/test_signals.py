"""Every signal: who sends it, in which process, in which order, with which arguments.

One worker goes through one scenario; the application has a receiver for each signal, which notes it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import celery
import pytest

from tests.celery.conftest import stages
from tests.celery.stage import CeleryStage, Servers, opened

TASKS = "tests.celery.proj.tasks"
#: Before, Celery's own workers tell of no failure when a call is rejected, which then has no result, or over its limit.
ALL_FAILURES = celery.VERSION >= (5, 7)


@dataclass(frozen=True)
class Played:
    """What was noted during the scenario, and the ids of its calls by name."""

    stage: CeleryStage
    ids: dict[str, str]

    def signals(self, **fields: Any) -> list[dict[str, Any]]:
        return self.stage.notes("signal", **fields)

    def of(self, call: str) -> list[tuple[str, str]]:
        """Return (process, signal) of the signals about a call, without those about sending it from here."""
        found = [(note["role"], note["name"]) for note in self.signals(id=self.ids[call])]
        return [(role, name) for role, name in found if not name.endswith(("_publish", "task_sent"))]


@pytest.fixture(scope="module", params=stages(("amqp", "rpc"), ("redis", "redis")))
def played(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Played]:
    with opened(servers, tmp_path_factory, *request.param, extras=("signals",)) as stage:
        worker = stage.start_worker("-c", "1", "-E", "-n", "signals@%h")
        ids = play(stage)
        assert worker.stop() == 0
        yield Played(stage, ids)


def play(stage: CeleryStage) -> dict[str, str]:
    """Send one call of each kind and return their ids when all have ended."""
    t = stage.tasks
    calls = {
        "good": t.add.delay(1, 2),
        "bad": t.fail.delay("ValueError", "bad"),
        "retried": t.retry_until.delay(1),
        "ignored": t.ignore.delay(),
        "rejected": t.reject.delay(False),
        "expired": t.add.apply_async((1, 2), countdown=0.5, expires=0.1),
        "parent": t.call_other.delay(1),
        "limited": t.sleep_for.apply_async((30,), time_limit=0.5),
        "unknown": stage.send("nobody_knows"),
    }
    for name, call in calls.items():
        if name != "ignored" and (name != "rejected" or ALL_FAILURES):
            stage.get(call, propagate=False)
    broken = str(uuid.uuid4())
    with stage.client.producer_pool.acquire() as producer:
        producer.publish({"neither": "protocol"}, routing_key="celery", exchange="", headers={"id": broken})
    stage.wait_for_notes("signal", name="task_rejected")
    terminated = t.sleep_for.delay(30)
    stage.wait_for_notes("holding", id=terminated.id)
    terminated.revoke(terminate=True)
    stage.error(terminated)
    stage.get(t.nothing.delay())  # in the third child
    stage.wait_for_empty()
    return {name: call.id for name, call in [*calls.items(), ("terminated", terminated)]}


# --- about one call ---------------------------------------------------------------------------------------------------

RECEIVED = ("main", "task_received")
PRERUN = ("child", "task_prerun")
POSTRUN = ("child", "task_postrun")

CALLS = {
    "good": [RECEIVED, PRERUN, ("child", "task_success"), POSTRUN],
    "bad": [RECEIVED, PRERUN, ("child", "task_failure"), POSTRUN],
    "ignored": [RECEIVED, PRERUN, POSTRUN],
    "rejected": [RECEIVED, PRERUN, POSTRUN, *([("main", "task_failure")] if ALL_FAILURES else [])],
    "expired": [RECEIVED, ("main", "task_revoked")],
    "unknown": [("main", "task_unknown")],
}


@pytest.mark.parametrize("call", CALLS)
def test_the_signals_about_a_call(played: Played, call: str) -> None:
    wanted = CALLS[call]
    found = played.of(call)
    # task_success does not say which call it is about.
    assert found == [signal for signal in wanted if signal != ("child", "task_success")]


@pytest.mark.parametrize(
    ("call", "signal"),
    [
        pytest.param("limited", "task_failure", marks=pytest.mark.since("5.7", "no failure is told for a hard limit")),
        ("terminated", "task_revoked"),
    ],
)
def test_the_signals_about_a_call_whose_child_is_ended(played: Played, call: str, signal: str) -> None:
    found = played.of(call)
    # Celery sends task_failure twice for a hard limit.
    assert set(found) - {POSTRUN} == {RECEIVED, PRERUN, ("main", signal)}
    assert found[:2] == [RECEIVED, PRERUN]
    # A child that is told by SIGTERM to end may still say that the call is over, without a state.
    assert [note["state"] for note in played.signals(name="task_postrun", id=played.ids[call])] in ([], [None])


def test_a_retried_call_has_signals_for_each_attempt(played: Played) -> None:
    found = played.of("retried")
    assert [name for role, name in found if role == "main"] == ["task_received", "task_received"]
    assert [name for role, name in found if role == "child"] == [
        *("task_prerun", "task_retry", "task_postrun"),
        *("task_prerun", "task_postrun"),
    ]


@pytest.mark.parametrize(
    ("call", "state"), [("good", "SUCCESS"), ("bad", "FAILURE"), ("ignored", "IGNORED"), ("rejected", "REJECTED")]
)
def test_task_postrun_tells_the_state(played: Played, call: str, state: str) -> None:
    (note,) = played.signals(name="task_postrun", id=played.ids[call])
    assert note["state"] == state


def test_each_success_is_told_once(played: Played) -> None:
    senders = [note["sender"] for note in played.signals(name="task_success")]
    assert sorted(senders) == sorted(
        f"task:{TASKS}.{name}" for name in ("add", "retry_until", "call_other", "dump_request", "nothing")
    )


def test_a_call_from_a_task_is_published_in_the_child(played: Played) -> None:
    names = [note["name"] for note in played.signals(role="child") if note["name"].endswith("_publish")]
    # One from call_other, one from retry_until's retry.
    assert sorted(names) == ["after_task_publish"] * 2 + ["before_task_publish"] * 2


# --- arguments --------------------------------------------------------------------------------------------------------

PUBLISHED = {f"str:{TASKS}.dump_request", f"str:{TASKS}.retry_until"}

ABOUT_TASKS = {
    # signal: senders, argument names
    "after_task_publish": (
        {f"str:{TASKS}.dump_request", f"str:{TASKS}.retry_until"},
        "body exchange headers routing_key",
    ),
    "before_task_publish": (
        {f"str:{TASKS}.dump_request", f"str:{TASKS}.retry_until"},
        "body declare exchange headers properties retry_policy routing_key",
    ),
    "task_received": ({"Consumer"}, "request"),
    "task_prerun": (None, "args kwargs task task_id"),
    "task_postrun": (None, "args kwargs retval state task task_id"),
    "task_success": (None, "result runtime"),
    "task_sent": (PUBLISHED, "args eta kwargs task task_id taskset"),
    "task_retry": ({f"task:{TASKS}.retry_until"}, "einfo reason request"),
    "task_failure": (
        {f"task:{TASKS}.{name}" for name in (["fail", "reject", "sleep_for"] if ALL_FAILURES else ["fail"])},
        "args einfo exception kwargs task_id traceback",
    ),
    "task_revoked": ({f"task:{TASKS}.add", f"task:{TASKS}.sleep_for"}, "expired request signum terminated"),
    "task_unknown": ({"Consumer"}, "exc id message name"),
    "task_rejected": ({"Consumer"}, "exc message"),
}


@pytest.mark.parametrize("name", ABOUT_TASKS)
def test_the_sender_and_arguments_of_signals_about_tasks(played: Played, name: str) -> None:
    senders, arguments = ABOUT_TASKS[name]
    notes = [note for note in played.signals(name=name) if note["role"] != "client"]
    assert {" ".join(note["arguments"]) for note in notes} == {arguments}
    if senders is None:
        assert {note["sender"].partition(":")[0] for note in notes} == {"task"}
    else:
        assert {note["sender"] for note in notes} == senders


# --- the worker's life ------------------------------------------------------------------------------------------------

LIFE = [
    # process, signal, sender, argument names: in this order, each once
    ("main", "import_modules", "Celery", ""),
    ("main", "celeryd_init", "str:signals", "conf instance options"),
    ("main", "worker_init", "Worker", ""),
    ("main", "after_setup_logger", "None", "colorize format logfile logger loglevel"),
    ("main", "after_setup_task_logger", "None", "colorize format logfile logger loglevel"),
    ("main", "celeryd_after_setup", "str:signals", "conf instance"),
    ("main", "worker_ready", "Consumer", ""),
    ("main", "worker_shutting_down", "str:signals", "exitcode how sig"),
    ("main", "worker_shutdown", "Worker", ""),
]


def test_the_main_process_tells_of_the_workers_life_in_order(played: Played) -> None:
    names = {name for _, name, _, _ in LIFE}
    found = [
        (note["role"], note["name"], note["sender"], " ".join(note["arguments"]))
        for note in played.signals(role="main")
        if note["name"] in names
    ]
    assert found == LIFE


def test_each_child_tells_of_its_beginning(played: Played) -> None:
    before = played.signals(name="worker_before_create_process")
    begun = played.signals(name="worker_process_init")
    assert {note["role"] for note in before} == {"main"}
    assert {note["role"] for note in begun} == {"child"}
    assert {note["sender"] for note in begun} == {"str:signals"}
    # One child at the start, one more after the hard limit and after the termination.
    assert len(before) >= 1
    assert len({note["pid"] for note in begun}) == len(begun) == 3


def test_the_last_child_tells_of_its_end(played: Played) -> None:
    ended = played.signals(name="worker_process_shutdown")
    last = played.signals(name="worker_process_init")[-1]
    # Those that were ended before may have had the time to tell it, or not.
    assert {(note["role"], *note["arguments"]) for note in ended} == {("child", "exitcode", "pid")}
    assert [note["pid"] for note in ended].count(last["pid"]) == 1


def test_heartbeats_are_told(played: Played) -> None:
    notes = played.signals(name="heartbeat_sent")
    assert {(note["role"], note["sender"], tuple(note["arguments"])) for note in notes} == {("main", "Heart", ())}


def test_no_other_signal_is_sent_by_a_worker(played: Played) -> None:
    known = {name for _, name, _, _ in LIFE} | ABOUT_TASKS.keys()
    known |= {"worker_before_create_process", "worker_process_init", "worker_process_shutdown", "heartbeat_sent"}
    assert {note["name"] for note in played.signals() if note["role"] != "client"} - known == set()
