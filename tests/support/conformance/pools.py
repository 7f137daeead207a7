"""What every pool must do, whatever its processes are: a suite over ``fastq.pool.Pool``, with a real message loop."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import psutil

from fastq.link import ACK
from fastq.pool import PoolKind
from tests.support.core_with_children import Running, child_with_stacks, run_loop


async def until(condition: Any, what: str, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.01)


async def run(at: Running, count: int, task: str = "noop", *args: Any) -> None:
    """Return when so many calls have ended well."""
    tags = [at.broker.put(task, *args) for _ in range(count)]
    await at.broker.until(lambda: all(at.broker.verdict(tag) == ACK for tag in tags), 20)


async def started(at: Running, count: int, seconds: float = 60) -> list[int]:
    """Return the processes of so many calls that run for long, once they do."""
    for _ in range(count):
        at.broker.put("sleep", seconds)
    await until(lambda: len(at.core.active()) == count, f"{count} calls that run")
    return [row["pid"] for row in at.core.active()]


class PoolConformance:
    """Derive from it and set ``kind``. ``has_children``: calls run in processes of their own, as many as wanted."""

    kind: PoolKind
    has_children = True

    def places(self, count: int) -> int:
        """Return how many calls run at a time where so many are asked for."""
        return count if self.has_children else 1

    def run_loop(self, body: Any, **options: Any) -> None:
        run_loop(body, kind=self.kind, **options)

    def test_calls_run_once_it_has_started(self) -> None:
        async def body(at: Running) -> None:
            assert at.pool.size == self.places(2)
            await run(at, 20)
            await until(lambda: len(at.pool.pids) == self.places(2), "the processes")
            assert all(psutil.pid_exists(pid) for pid in at.pool.pids)

        self.run_loop(body, concurrency=2)

    def test_as_many_calls_run_at_a_time_as_it_has_places(self) -> None:
        async def body(at: Running) -> None:
            count = self.places(3)
            pids = await started(at, count)
            at.broker.put("noop")
            await asyncio.sleep(0.1)
            assert len(set(pids)) == count
            assert at.core.running == count
            at.core.give_back_running()
            at.pool.kill()

        self.run_loop(body, concurrency=3)

    def test_a_child_that_dies_is_replaced_and_its_call_runs_again(self) -> None:
        if not self.has_children:
            self._ends_by_itself()
            return

        async def body(at: Running) -> None:
            first = list(at.pool.pids)
            tag = at.broker.put("sleep", 0.5)
            await until(lambda: len(at.core.active()) == 1, "a call that runs")
            os.kill(at.core.active()[0]["pid"], signal.SIGKILL)
            await at.broker.until(lambda: at.broker.verdict(tag) == ACK, 20)
            await until(lambda: len(at.pool.pids) == 1 and at.pool.pids != first, "another process")
            assert len(at.hooks.lost) == 1
            assert "SIGKILL" in at.hooks.lost[0][1]

        self.run_loop(body)

    def _ends_by_itself(self) -> None:
        """What ends a child by an exception, where the process is the worker's own, ends the call alone."""

        async def body(at: Running) -> None:
            tag = at.broker.put("leave", 5)
            await at.broker.until(lambda: at.broker.verdict(tag) is not None, 20)
            assert [event[1] for event in at.hooks.events if event[0] == "failure"] == ["lost"]
            assert [reason for _, reason in at.hooks.lost] == ["exitcode 5"] * 3
            await run(at, 3)

        self.run_loop(body)

    def test_children_are_replaced_after_so_many_calls_and_nothing_is_lost(self) -> None:
        async def body(at: Running) -> None:
            tags = [at.broker.put("pid") for _ in range(40)]
            await at.broker.until(lambda: all(at.broker.verdict(tag) == ACK for tag in tags), 20)
            pids = [saved[2] for saved in at.broker.saved]
            assert len(pids) == 40
            assert not self.has_children or max(pids.count(pid) for pid in pids) <= 5
            assert at.hooks.lost == []

        self.run_loop(body, concurrency=2, max_tasks_per_child=5)

    def test_a_call_over_its_hard_limit_ends_with_its_process_and_others_run(self) -> None:
        async def body(at: Running) -> None:
            # What holds the interpreter's lock holds up a loop in the same process too.
            tag = at.broker.put("stuck" if self.has_children else "sleep", 30)
            await at.broker.until(lambda: at.broker.verdict(tag) == ACK, 20)
            assert [event[1] for event in at.hooks.events if event[0] == "failure"] == ["time-limit"]
            await run(at, 3)

        self.run_loop(body, time_limit=0.3)

    def test_a_call_that_is_terminated_ends_with_its_process_and_others_run(self) -> None:
        async def body(at: Running) -> None:
            await started(at, 1)
            (task_id,) = (row["id"] for row in at.core.active())
            assert at.core.terminate({task_id}, signal.SIGKILL) == [task_id]
            await until(lambda: at.core.running == 0, "its end")
            assert [event[1] for event in at.hooks.events if event[0] == "failure"] == ["terminated"]
            await run(at, 3)

        self.run_loop(body)

    def test_a_child_says_where_it_is(self) -> None:
        async def body(at: Running) -> None:
            (pid,) = await started(at, 1)
            (child,) = (each for each in at.core.children if each.pid == pid)
            at.pool.dump_stack(child)
            await until(lambda: "core_with_children" in at.pool.stacks(child), "its stacks")
            at.pool.kill_child(child)
            await until(lambda: child.gone, "its end")
            at.core.give_back_running()

        self.run_loop(body, main_of_child=child_with_stacks)

    def test_it_grows_and_shrinks_to_one_and_running_calls_end_well(self) -> None:
        async def body(at: Running) -> None:
            at.pool.grow(2)
            assert at.pool.size == self.places(3)
            await until(lambda: len(at.pool.pids) == self.places(3), "three processes")
            tags = [at.broker.put("sleep", 0.5) for _ in range(3)]
            await until(lambda: at.core.running == self.places(3), "calls in all places")
            at.pool.shrink(5)
            assert at.pool.size == 1
            await at.broker.until(lambda: all(at.broker.verdict(tag) == ACK for tag in tags), 20)
            await until(lambda: len(at.pool.pids) == 1, "one process")
            await run(at, 5)

        self.run_loop(body)

    def test_a_restart_replaces_all_after_their_calls(self) -> None:
        async def body(at: Running) -> None:
            await until(lambda: len(at.pool.pids) == self.places(2), "the processes")
            before = set(at.pool.pids)
            tag = at.broker.put("sleep", 0.3)
            await until(lambda: len(at.core.active()) == 1, "a call that runs")
            at.pool.restart()
            await at.broker.until(lambda: at.broker.verdict(tag) == ACK, 20)
            if self.has_children:
                await until(lambda: len(at.pool.pids) == 2 and before.isdisjoint(at.pool.pids), "two other processes")
            await run(at, 3)
            assert at.hooks.lost == []

        self.run_loop(body, concurrency=2)

    def test_a_stop_waits_for_calls_and_kills_at_its_deadline(self) -> None:
        async def body(at: Running) -> None:
            tag = at.broker.put("sleep", 0.3)
            await until(lambda: len(at.core.active()) == 1, "a call that runs")
            pids = list(at.pool.pids)
            at.core.quiet()
            await at.pool.stop(20)
            assert at.broker.verdict(tag) == ACK
            assert at.pool.pids == []
            assert not self.has_children or not any(psutil.pid_exists(pid) for pid in pids)

        self.run_loop(body, concurrency=2)

        async def again(at: Running) -> None:
            """One call was ended before."""
            await started(at, 1)
            at.core.terminate({row["id"] for row in at.core.active()}, signal.SIGKILL)
            await until(lambda: at.core.running == 0, "its end")
            tag = at.broker.put("sleep", 0.3)
            await until(lambda: len(at.core.active()) == 1, "a call that runs")
            at.core.quiet()
            await at.pool.stop(20)
            assert at.broker.verdict(tag) == ACK

        self.run_loop(again)

        async def impatient(at: Running) -> None:
            pids = await started(at, self.places(2))
            at.core.quiet()
            began = time.monotonic()
            await at.pool.stop(0.2)
            assert time.monotonic() - began < 10
            assert not self.has_children or not any(psutil.pid_exists(pid) for pid in pids)

        self.run_loop(impatient, concurrency=2)
