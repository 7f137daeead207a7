"""The message loop with real children: who runs what, when it is settled, and what happens when something dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

import pytest

from fastq.link import ACK, REJECT, REQUEUE, RETURN
from tests.support.core_with_children import Running, run_loop


def test_every_delivery_runs_and_is_acknowledged_once() -> None:
    async def body(t: Running) -> None:
        tags = [t.broker.put("noop", number) for number in range(3000)]
        await t.broker.until(lambda: len(t.broker.settled) == 3000)
        assert sorted(tag for tag, _ in t.broker.settled) == tags
        assert {verdict for _, verdict in t.broker.settled} == {ACK}
        assert t.core.is_idle

    run_loop(body, concurrency=2)


def test_a_result_is_saved_no_later_than_its_delivery_is_settled() -> None:
    async def body(t: Running) -> None:
        tag = t.broker.put("pid")
        await t.broker.until(lambda: t.broker.verdict(tag) == ACK)
        [(_, state, meta, _)] = t.broker.saved
        assert state == "SUCCESS"
        assert int(meta) in t.pool.pids

    run_loop(body)


def test_the_main_process_runs_no_python_frame_per_task() -> None:
    async def body(t: Running) -> None:
        count = 0

        def profile(frame: object, event: str, argument: object) -> None:
            nonlocal count
            if event == "call":
                count += 1

        for number in range(200):
            t.broker.put("noop", number)
        await t.broker.until(lambda: len(t.broker.settled) == 200)
        for number in range(2000):
            t.broker.queue.append((1000 + number, b"celery", *_message(), 1))
        sys.setprofile(profile)
        t.broker.pull(0)
        t.broker.room = 100
        t.broker._give()
        await t.broker.until(lambda: len(t.broker.settled) == 2200)
        sys.setprofile(None)
        # The broker of lists costs frames per batch; per task there is none.
        assert count < 2000 / 2, count

    run_loop(body, window=1000)


def _message() -> tuple[bytes, bytes]:
    from fastq.wire.ids import new_id
    from fastq.wire.message import encode_task

    message = encode_task("noop", new_id(), b"[[],{},{}]", ignore_result=True)
    return message.props, message.body


def test_short_calls_behind_a_long_one_are_taken_back_and_run_elsewhere() -> None:
    async def body(t: Running) -> None:
        for number in range(300):
            t.broker.put("noop", number)
        await t.broker.until(lambda: len(t.broker.settled) == 300)
        started = time.monotonic()
        long = t.broker.put("sleep", 2)
        tags = [t.broker.put("noop", number) for number in range(200)]
        await t.broker.until(lambda: all(t.broker.verdict(tag) == ACK for tag in tags))
        assert time.monotonic() - started < 1.5
        assert t.broker.verdict(long) is None
        await t.broker.until(lambda: t.broker.verdict(long) == ACK)

    run_loop(body, concurrency=2)


def test_a_task_that_turns_out_long_gives_up_what_was_handed_over_behind_it() -> None:
    async def body(t: Running) -> None:
        # Teach the loop that "sleep" is short, so that calls are handed over in advance, then sleep long.
        for _ in range(200):
            t.broker.put("sleep", 0)
        await t.broker.until(lambda: len(t.broker.settled) == 200)
        t.broker.put("sleep", 1.5)
        tags = [t.broker.put("sleep", 0) for _ in range(100)]
        started = time.monotonic()
        await t.broker.until(lambda: all(t.broker.verdict(tag) == ACK for tag in tags))
        assert time.monotonic() - started < 1.2
        assert t.core.stats()["ledger"]["started"] == 1

    run_loop(body, concurrency=2)


def test_short_calls_wake_no_more_children_than_there_are_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    woken: list[int] = []

    async def body(t: Running) -> None:
        for _burst in range(40):
            t.broker.saved.clear()
            # All at once, less than a millisecond of work; the first bursts teach the loop how short the calls are.
            for _ in range(8):
                t.broker.put("nap")
            await t.broker.until(lambda: len(t.broker.saved) == 8)
            woken.append(len({meta for _, _, meta, _ in t.broker.saved}))

    run_loop(body, concurrency=cores + 6)
    print(sorted(woken))
    # A child that the system stops for a moment looks as if its call were long: then another one is woken.
    assert sorted(woken)[len(woken) // 4] <= cores


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_dead_childs_call_runs_again_and_the_calls_behind_it_too(how: str) -> None:
    async def body(t: Running) -> None:
        [pid] = t.pool.pids
        tag = t.broker.put("sleep", 0.5) if how == "kill" else t.broker.put("die", 9)
        tags = [t.broker.put("noop", number) for number in range(20)]
        if how == "kill":
            await asyncio.sleep(0.1)
            os.kill(pid, signal.SIGKILL)
            await t.broker.until(lambda: t.broker.verdict(tag) == ACK)
        else:
            await t.broker.until(lambda: t.broker.verdict(tag) == REJECT)
            assert next(event for event in t.hooks.events if event[0] == "failure")[1] == "lost"
            assert len(t.hooks.lost) == 3
        await t.broker.until(lambda: all(t.broker.verdict(each) == ACK for each in tags))
        assert pid not in t.pool.pids

    run_loop(body)


def test_in_compat_a_started_call_is_acknowledged_first_and_fails_when_its_child_dies() -> None:
    async def body(t: Running) -> None:
        tag = t.broker.put("die", 9)
        after = [t.broker.put("noop") for _ in range(10)]
        await t.broker.until(lambda: bool(t.broker.saved) and all(t.broker.verdict(each) == ACK for each in after))
        assert t.broker.verdict(tag) == ACK
        assert [event[1] for event in t.hooks.events if event[0] == "failure"] == ["lost"]
        assert len(t.hooks.lost) == 1

    early = {"acks_late": False, "requeue_lost": False}
    run_loop(body, tasks={"die": early, "noop": early}, reliable=False)


def test_the_hard_limit_ends_a_child_that_is_stuck_in_c() -> None:
    async def body(t: Running) -> None:
        started = time.monotonic()
        tag = t.broker.put("stuck", 20, time_limit=0.5)
        after = t.broker.put("noop")
        await t.broker.until(lambda: t.broker.verdict(tag) == ACK and t.broker.verdict(after) == ACK)
        assert 0.5 <= time.monotonic() - started < 1.5
        assert ("failure", "time-limit", "stuck", 0.5) in t.hooks.events

    run_loop(body)


def test_children_are_recycled_by_count_with_the_replacement_ready_first_and_nothing_is_lost() -> None:
    async def body(t: Running) -> None:
        tags = [t.broker.put("pid") for _ in range(500)]
        await t.broker.until(lambda: len(t.broker.settled) == 500)
        assert sorted(tag for tag, _ in t.broker.settled) == tags
        by_pid: dict[int, int] = {}
        for _, _, meta, _ in t.broker.saved:
            by_pid[int(meta)] = by_pid.get(int(meta), 0) + 1
        assert max(by_pid.values()) <= 50
        assert len(by_pid) >= 10
        assert not t.hooks.lost

    run_loop(body, concurrency=2, max_tasks_per_child=50, keeps_spare=True)


def test_a_follow_up_is_confirmed_before_the_delivery_is_settled() -> None:
    async def body(t: Running) -> None:
        tag = t.broker.put("publish")
        await t.broker.until(lambda: t.broker.verdict(tag) == ACK)
        assert [message.routing_key for message in t.broker.sent] == ["other"]

    run_loop(body)


def test_a_refused_follow_up_sends_the_delivery_back() -> None:
    async def body(t: Running) -> None:
        t.broker.confirms = False
        tag = t.broker.put("publish")
        await t.broker.until(lambda: t.broker.verdict(tag) == REQUEUE)
        assert ("unconfirmed", "publish") in t.hooks.events

    run_loop(body)


def test_a_follow_up_belongs_to_the_call_that_sent_it_when_the_child_is_further_on_already() -> None:
    async def body(t: Running) -> None:
        known = [t.broker.put(task) for task in ("publish", "noop") * 20]
        await t.broker.until(lambda: len(t.broker.settled) == len(known))
        t.broker.confirms = False
        sender, others = t.broker.put("publish"), [t.broker.put("noop") for _ in range(5)]
        # Both are written to the child in this turn, and it has ended both when the loop looks next.
        t.loop.call_soon(t.loop.call_soon, time.sleep, 0.1)
        await t.broker.until(lambda: len(t.broker.settled) == len(known) + 6)
        assert t.broker.verdict(sender) == REQUEUE
        assert {t.broker.verdict(tag) for tag in others} == {ACK}

    run_loop(body)


def test_a_state_is_stored_while_the_call_runs() -> None:
    async def body(t: Running) -> None:
        tag = t.broker.put("state")
        await t.broker.until(lambda: t.broker.verdict(tag) == ACK)
        assert next((state, meta) for _, state, meta, _ in t.broker.saved) == ("PROGRESS", b'{"n":1}')

    run_loop(body)


@pytest.mark.parametrize("size", [1, 100_000, 131_000, 300_000, 3_000_000])
def test_a_result_of_any_size_comes_through_the_ring(size: int) -> None:
    async def body(t: Running) -> None:
        tags = [t.broker.put("large", size) for _ in range(5)]
        await t.broker.until(lambda: all(t.broker.verdict(tag) == ACK for tag in tags))
        assert [len(meta) for _, _, meta, _ in t.broker.saved] == [size + 2] * 5

    run_loop(body)


def test_an_eta_is_kept_and_the_tasks_behind_it_are_not_held_back() -> None:
    async def body(t: Running) -> None:
        due = time.time() + 0.6
        early = t.broker.put("noop", eta=due)
        now = t.broker.put("noop")
        await t.broker.until(lambda: t.broker.verdict(now) == ACK)
        assert t.broker.verdict(early) is None
        assert time.time() < due
        await t.broker.until(lambda: t.broker.verdict(early) == ACK)
        assert due <= time.time() < due + 0.3

    run_loop(body)


def test_an_expired_message_does_not_run() -> None:
    async def body(t: Running) -> None:
        tag = t.broker.put("pid", expires=time.time() - 1)
        await t.broker.until(lambda: t.broker.verdict(tag) == ACK)
        assert t.hooks.events[0][:2] == ("failure", "expired")

    run_loop(body)


def test_unknown_tasks_and_endless_redeliveries_go_to_the_dead_letters() -> None:
    async def body(t: Running) -> None:
        unknown, often = t.broker.put("nobody.knows"), t.broker.put("noop", deliveries=21)
        await t.broker.until(lambda: len(t.broker.settled) == 2)
        assert t.broker.verdict(unknown) == t.broker.verdict(often) == REJECT
        assert t.core.refused == {"unknown": 1, "deliveries": 1}

    run_loop(body)


def test_hold_starts_nothing_more_until_resume_and_quiet_gives_it_back() -> None:
    async def body(t: Running) -> None:
        first = t.broker.put("sleep", 0.3)
        rest = [t.broker.put("noop") for _ in range(10)]
        await asyncio.sleep(0.1)
        t.core.hold()
        rest.append(t.broker.put("noop"))
        await t.broker.until(lambda: t.broker.verdict(first) == ACK)
        await asyncio.sleep(0.1)
        assert [tag for tag, _ in t.broker.settled] == [first]
        assert not t.core.is_idle
        t.core.resume()
        await t.broker.until(lambda: t.core.is_idle)
        assert {t.broker.verdict(tag) for tag in rest} == {ACK}
        t.core.hold()
        rest = [t.broker.put("noop")]
        await asyncio.sleep(0.1)
        t.core.quiet()
        await t.broker.until(lambda: t.core.is_idle)
        assert {t.broker.verdict(tag) for tag in rest} == {RETURN}

    run_loop(body)


def test_quiet_gives_back_what_has_not_started() -> None:
    async def body(t: Running) -> None:
        first = t.broker.put("sleep", 0.4)
        rest = [t.broker.put("sleep", 0.4) for _ in range(10)]
        later = t.broker.put("noop", eta=time.time() + 60)
        await asyncio.sleep(0.1)
        t.core.quiet()
        await t.broker.until(lambda: t.broker.verdict(first) == ACK)
        assert {t.broker.verdict(tag) for tag in [*rest, later]} == {RETURN}

    run_loop(body)


def test_reasons_of_what_is_rejected_are_not_kept_where_nobody_takes_them() -> None:
    async def body(t: Running) -> None:
        tags = [t.broker.put("nobody.knows") for _ in range(3)]
        await t.broker.until(lambda: all(t.broker.verdict(tag) == REJECT for tag in tags))
        assert t.broker.take_reasons(tags) == {"rejected": tags}

    run_loop(body)
