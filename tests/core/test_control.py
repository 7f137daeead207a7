"""The message loop steered and watched: revocation, rate limits, termination, older messages, reports, postponing."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from typing import Any

from fastq.link import ACK, REJECT, RETURN, BatchSource
from fastq.wire.ids import new_id
from fastq.wire.message import Message, encode_task
from tests.support.core_with_children import Running, run_loop


def put(t: Running, task: str, *args: Any, **options: Any) -> tuple[int, str]:
    """Queue a task message and return its tag and id."""
    task_id = new_id()
    message = encode_task(task, task_id, json.dumps([args, {}, {}]).encode(), **options)
    return t.broker.put_raw(message.props, message.body), task_id


def kinds(t: Running) -> list[str]:
    return [event[1] for event in t.hooks.events if event[0] == "failure"]


async def until(condition: Callable[[], bool]) -> None:
    """Return when the condition holds, which no event tells of. The test's own deadline is the limit."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


# --- revoked


def test_a_revoked_call_does_not_run() -> None:
    async def body(t: Running) -> None:
        task_id = new_id()
        t.core.revoked = {task_id}
        message = encode_task("pid", task_id, b"[[],{},{}]")
        tag = t.broker.put_raw(message.props, message.body)
        await t.broker.until(lambda: t.broker.verdict(tag) == ACK)
        assert kinds(t) == ["revoked"]
        assert t.core.done == 0

    run_loop(body)


def test_a_call_that_is_revoked_behind_a_long_one_does_not_run() -> None:
    async def body(t: Running) -> None:
        long, _ = put(t, "sleep", 0.5)
        tag, task_id = put(t, "pid")
        await asyncio.sleep(0.05)
        assert [row["id"] for row in t.core.reserved()] == [task_id]
        t.core.revoked = {task_id}
        await t.broker.until(lambda: t.broker.verdict(long) == ACK and t.broker.verdict(tag) == ACK)
        assert kinds(t) == ["revoked"]

    run_loop(body)


def test_a_call_that_was_handed_over_in_advance_can_still_be_revoked() -> None:
    async def body(t: Running) -> None:
        # Taught that "sleep" is short, the loop hands calls over in advance.
        for _ in range(200):
            t.broker.put("sleep", 0)
        await t.broker.until(lambda: len(t.broker.settled) == 200)
        put(t, "sleep", 0.3)
        waiting = [put(t, "sleep", 0) for _ in range(20)]
        await asyncio.sleep(0.002)
        t.core.revoked = {task_id for _, task_id in waiting}
        await t.broker.until(lambda: len(t.broker.settled) == 221)
        assert kinds(t) == ["revoked"] * 20

    run_loop(body)


def test_a_revoked_eta_task_is_dropped_when_its_time_comes() -> None:
    async def body(t: Running) -> None:
        tag, task_id = put(t, "pid", eta=time.time() + 0.3)
        await asyncio.sleep(0.05)
        [row] = t.core.scheduled()
        assert row["id"] == task_id
        assert abs(row["eta"] - time.time()) < 0.4
        t.core.revoked = {task_id}
        await t.broker.until(lambda: t.broker.verdict(tag) == ACK)
        assert kinds(t) == ["revoked"]

    run_loop(body)


# --- termination


def test_a_running_call_is_terminated_and_the_calls_behind_it_run() -> None:
    async def body(t: Running) -> None:
        tag, task_id = put(t, "sleep", 30)
        others = [put(t, "noop", number)[0] for number in range(5)]
        await asyncio.sleep(0.1)
        [row] = t.core.active()
        assert (row["id"], row["pid"]) == (task_id, t.pool.pids[0])
        assert t.core.terminate({task_id, "unknown"}, signal.SIGKILL) == [task_id]
        await t.broker.until(lambda: all(t.broker.verdict(each) == ACK for each in [tag, *others]))
        assert kinds(t) == ["terminated"]
        assert ("terminate", signal.SIGKILL) in t.hooks.events

    run_loop(body)


def test_a_call_that_does_not_run_cannot_be_terminated() -> None:
    async def body(t: Running) -> None:
        _, task_id = put(t, "pid", eta=time.time() + 60)
        await asyncio.sleep(0.05)
        assert t.core.terminate({task_id}, signal.SIGKILL) == []

    run_loop(body)


# --- rate limits


def test_a_rate_limit_spaces_calls_and_holds_back_no_other_task() -> None:
    async def body(t: Running) -> None:
        started = time.monotonic()
        limited = [put(t, "noop", number)[0] for number in range(6)]
        free, _ = put(t, "pid")
        await t.broker.until(lambda: t.broker.verdict(free) == ACK)
        assert time.monotonic() - started < 0.2
        await t.broker.until(lambda: all(t.broker.verdict(tag) == ACK for tag in limited))
        assert 0.45 < time.monotonic() - started < 1.5

    run_loop(body, tasks={"noop": {"rate_limit": 10}})


def test_a_rate_limit_can_be_lifted_while_calls_wait() -> None:
    async def body(t: Running) -> None:
        first, _ = put(t, "noop", 0)
        await t.broker.until(lambda: t.broker.verdict(first) == ACK)
        t.core.tasks[b"noop"].rate_limit = 0
        tags = [put(t, "noop", number)[0] for number in range(50)]
        started = time.monotonic()
        await t.broker.until(lambda: all(t.broker.verdict(tag) == ACK for tag in tags))
        assert time.monotonic() - started < 2

    run_loop(body, tasks={"noop": {"rate_limit": 0.5}})


# --- who records, who watches


def test_a_failure_that_others_record_is_settled_as_they_say() -> None:
    async def body(t: Running) -> None:
        t.hooks.records_elsewhere = True
        tag, _ = put(t, "pid", expires=time.time() - 1)
        await asyncio.sleep(0.1)
        assert t.broker.verdict(tag) is None
        assert not t.core.is_idle
        [delivery] = t.hooks.unrecorded
        t.core.recorded(delivery, REJECT)
        await t.broker.until(lambda: t.broker.verdict(tag) == REJECT)
        assert t.core.is_idle

    run_loop(body)


def test_starts_and_ends_are_reported_while_somebody_wants_to_know() -> None:
    async def body(t: Running) -> None:
        quiet, _ = put(t, "pid")
        await t.broker.until(lambda: t.broker.verdict(quiet) == ACK)
        t.core.wants_received = t.core.wants_outcomes = True
        tag, task_id = put(t, "pid")
        await t.broker.until(lambda: t.broker.verdict(tag) == ACK)
        assert [event[0] for event in t.hooks.events] == ["received", "started", "finished"]
        assert t.hooks.events[1] == ("started", task_id)
        assert t.hooks.events[2][1:3] == ("pid", "SUCCESS")

    run_loop(body)


def test_a_delivery_waits_for_those_who_were_told_of_it() -> None:
    async def body(t: Running) -> None:
        t.core.wants_received = t.hooks.keeps = True
        (first, _), (second, _) = put(t, "pid"), put(t, "pid")
        await asyncio.sleep(0.1)
        assert len(t.hooks.kept) == 2
        t.core.proceed(t.hooks.kept[0])
        t.core.proceed(t.hooks.kept[0])
        await t.broker.until(lambda: t.broker.verdict(first) == ACK)
        assert t.core.done == 1
        t.core.quiet()
        # The other one is given back, though nobody has answered.
        assert t.broker.verdict(second) == RETURN
        t.core.proceed(t.hooks.kept[1])
        assert t.core.done == 1

    run_loop(body)


def test_a_message_of_an_older_form_runs_once_it_is_translated() -> None:
    async def body(t: Running) -> None:
        message = encode_task("pid", new_id(), b"[[],{},{}]")
        t.core.reads_foreign = True
        t.hooks.converted = (message.props, message.body)
        tag = t.broker.put_raw(b"\x00\x00", b'{"task": "pid"}')
        await t.broker.until(lambda: t.broker.verdict(tag) == ACK)
        assert t.core.done == 1
        t.hooks.converted = None
        bad = t.broker.put_raw(b"\x00\x00", b"{}")
        await t.broker.until(lambda: t.broker.verdict(bad) == REJECT)
        assert t.core.refused == {"no-task": 1}

    run_loop(body)


def test_a_retry_does_not_overtake_the_run_that_asked_for_it() -> None:
    async def body(t: Running) -> None:
        _, task_id = put(t, "sleep", 0.3)
        await until(lambda: bool(t.core.active()))
        message = encode_task("noop", task_id, b"[[],{},{}]", retries=1)
        again = t.broker.put_raw(message.props, message.body)
        other, _ = put(t, "noop", retries=1)
        await t.broker.until(lambda: t.broker.verdict(other) == ACK)
        assert t.broker.verdict(again) is None
        await t.broker.until(lambda: t.broker.verdict(again) == ACK)
        assert [tag for tag, _ in t.broker.settled][-2:] == [1, again]

    run_loop(body, concurrency=2)


# --- postponing


def test_what_is_due_later_than_many_others_goes_back_to_the_broker() -> None:
    async def body(t: Running) -> None:
        kept: list[float] = []

        def postpone(found: dict[str, Any], due: float) -> Message | None:
            kept.append(due)
            return Message("later", "celery", found["props"], found["body"], found["id"])

        for _ in range(1000):
            t.broker.put("pid", eta=time.time() + 3600)
        await until(lambda: t.core.stats()["scheduled"] == 1000)
        far, _ = put(t, "pid", eta=time.time() + 3600)
        await asyncio.sleep(0.05)
        assert t.core.stats()["scheduled"] == 1001
        t.broker.postpone = postpone
        t.core.postpone_far()
        assert len(kept) == 1
        far, far_id = put(t, "pid", eta=time.time() + 3600)
        near, _ = put(t, "pid", eta=time.time() + 5)
        await t.broker.until(lambda: t.broker.verdict(far) == ACK)
        assert [message.id for message in t.broker.sent][-1] == far_id
        assert t.broker.verdict(near) is None
        assert t.core.postponed == 2

    run_loop(body, window=5000)


def test_large_messages_go_back_once_the_broker_can_keep_them() -> None:
    """They came while it could not, and are few: more is not read as long as they are here."""

    async def body(t: Running) -> None:
        t.broker.max_held_bytes = 4096
        for _ in range(8):
            t.broker.put("pid", "x" * 512, eta=time.time() + 3600)
        await until(lambda: t.core.stats()["scheduled"] == 8)
        assert t.broker.held_bytes > t.broker.max_held_bytes
        t.broker.postpone = lambda found, due: Message("later", "celery", found["props"], found["body"], found["id"])
        t.core.postpone_far()
        await until(lambda: t.broker.held_bytes <= 1024)
        assert t.core.stats()["scheduled"] == 1

    run_loop(body)


# --- a store that goes away


def test_results_that_a_lost_store_has_not_confirmed_go_to_the_next_one() -> None:
    class Store(BatchSource):
        def __init__(self, confirms: bool) -> None:
            super().__init__()
            self.confirms = confirms
            self.saved: list[str] = []

        def pull(self, n: int) -> None:
            pass

        def save(self, batch: list[tuple[str, str, bytes, str, int]]) -> None:
            self.saved += [task_id for task_id, *_ in batch]
            if self.confirms:
                asyncio.get_running_loop().call_soon(self.published, [token for *_, token in batch])

    async def body(t: Running) -> None:
        silent, next_one = Store(False), Store(True)
        t.core.set_store(silent)
        tag, task_id = put(t, "pid")
        await until(lambda: bool(silent.saved))
        silent.bury()
        late, late_id = put(t, "pid")
        await until(lambda: t.core.done == 2)
        assert t.broker.verdict(tag) is None
        t.core.set_store(next_one)
        await t.broker.until(lambda: t.broker.verdict(tag) == ACK and t.broker.verdict(late) == ACK)
        assert next_one.saved == [task_id, late_id]

    run_loop(body)


def test_what_waits_for_a_store_that_is_away_holds_up_no_other_task_and_is_bounded() -> None:
    class Store(BatchSource):
        saved = 0

        def pull(self, n: int) -> None:
            pass

        def save(self, batch: list[tuple[str, str, bytes, str, int]]) -> None:
            self.saved += len(batch)
            asyncio.get_running_loop().call_soon(self.published, [token for *_, token in batch])

    async def body(t: Running) -> None:
        away, next_one = Store(), Store()
        away.bury()
        t.core.set_store(away)
        # Five times as many as may be held, a megabyte each: 63 of them are kept.
        for _ in range(80):
            put(t, "large", 1 << 20)
        tag, _ = put(t, "pid", ignore_result=True)
        await t.broker.until(lambda: t.broker.verdict(tag) == ACK)
        await until(lambda: t.core.done == 81)
        lost = sum(event[0] == "result_lost" for event in t.hooks.events)
        assert (lost, t.broker.held, t.broker.shelved, away.unsaved_bytes <= 64 << 20) == (17, 0, 63, True)
        await t.broker.until(lambda: len(t.broker.settled) == 18)
        t.core.set_store(next_one)
        await t.broker.until(lambda: len(t.broker.settled) == 81)
        assert (next_one.saved, next_one.unsaved_bytes, t.broker.held, t.broker.shelved) == (63, 0, 0, 0)

    run_loop(body, window=16)


def test_a_store_that_takes_nothing_holds_up_no_other_task() -> None:
    """It stands, and says neither yes nor no: short of memory, or locked."""

    class Silent(BatchSource):
        def pull(self, n: int) -> None:
            pass

        def save(self, batch: list[tuple[str, str, bytes, str, int]]) -> None:
            pass

    async def body(t: Running) -> None:
        t.core.set_store(Silent())
        for _ in range(40):
            put(t, "pid")
        await until(lambda: t.core.done == 4)
        t.core.look_at_store()
        assert not t.core.is_store_away
        t.core.look_at_store()
        assert t.core.is_store_away
        await until(lambda: t.core.done == 40)
        assert t.core.only_stores
        assert t.broker.settled == []

    run_loop(body, window=4)
