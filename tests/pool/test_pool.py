"""Slots are filled whatever children do at their start: die, hang, hold a lock. No child is left over."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastq.link import ACK
from fastq.pool import ChildMain, supervisor
from tests.support.core_with_children import Running, child_main, run_loop
from tests.support.servers import wait_until
from tests.support.worker_process import WorkerProcess


def counted(folder: Path, before: Callable[[int, int], None]) -> ChildMain:
    """Return children that first call ``before`` with how many were started so far, from 1 on, and their number."""

    def main(sock: int, shared: int, number: int, group: int = 0) -> int:
        file = os.open(folder / "starts", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.write(file, b".")
        before(os.lseek(file, 0, os.SEEK_CUR), number)
        return child_main(sock, shared, number)

    return main


def starts(folder: Path) -> int:
    return (folder / "starts").stat().st_size


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        await asyncio.sleep(0.01)


async def run(at: Running, count: int, task: str = "noop", *args: Any) -> None:
    """Return when so many calls have ended."""
    tags = [at.broker.put(task, *args) for _ in range(count)]
    await at.broker.until(lambda: all(at.broker.verdict(tag) == ACK for tag in tags), 20)


def processes(at: Running) -> list[int]:
    return [child.pid for child in psutil.Process(at.pool.zygote.pid).children()]


# --- starts that fail


def test_a_spare_that_dies_before_it_is_ready_costs_no_slot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def before(n: int, number: int) -> None:
        if n in (2, 4, 5, 6):
            os._exit(3)

    async def body(at: Running) -> None:
        await run(at, 8)
        assert not [event for event in at.hooks.events if event[0] == "fatal"]

    run_loop(
        body,
        keeps_spare=True,
        max_tasks_per_child=1,
        main_of_child=counted(tmp_path, before),
    )
    lines = [each.getMessage() for each in caplog.records if "before it was ready" in each.getMessage()]
    assert len(lines) == 4
    assert "exited with 'exitcode 3' before it was ready; another one is started in 0.1 s" in lines[0]


def test_a_pool_of_which_one_child_was_ready_never_gives_up_but_pauses_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)

    def before(n: int, number: int) -> None:
        if 1 < n < 15:
            os._exit(3)

    async def body(at: Running) -> None:
        await run(at, 3)
        await until(lambda: len(at.pool.pids) == 3, "full pool")
        assert not [event for event in at.hooks.events if event[0] == "fatal"]

    run_loop(body, concurrency=3, main_of_child=counted(tmp_path, before))
    pauses = [float(each[1]) for each in re.finditer(r"another one is started in ([0-9.]+) s", caplog.text)]
    assert len(pauses) == 13
    assert pauses[0] < 0.1 < max(pauses)


def test_a_spare_that_is_killed_while_a_slot_waits_for_it_is_replaced(tmp_path: Path) -> None:
    def before(n: int, number: int) -> None:
        if n == 2:
            time.sleep(60)

    async def body(at: Running) -> None:
        await run(at, 1)
        await until(lambda: starts(tmp_path) >= 2 and bool(at.pool.spares and at.pool.spares[0].pid), "second start")
        hanging = at.pool.spares[0]
        assert not hanging.is_ready
        assert hanging.pid > 0
        os.kill(hanging.pid, signal.SIGKILL)
        await run(at, 3)

    run_loop(body, keeps_spare=True, max_tasks_per_child=1, main_of_child=counted(tmp_path, before))


def test_a_ready_spare_that_is_killed_is_reported_and_replaced() -> None:
    async def body(at: Running) -> None:
        await until(lambda: any(member.is_ready for member in at.pool.spares), "ready spare")
        pid = at.pool.spares[0].pid
        os.kill(pid, signal.SIGKILL)
        await until(
            lambda: [title.rpartition(":")[2] for title, _ in at.hooks.lost] == [str(pid)], "report of the death"
        )
        await until(lambda: any(member.is_ready for member in at.pool.spares), "another spare")

    run_loop(body, keeps_spare=True)


# --- starts that hang


def test_a_child_that_hangs_at_its_start_holds_up_no_other_and_is_named_killed_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def before(n: int, number: int) -> None:
        if n == 1:
            time.sleep(60)

    async def body(at: Running) -> None:
        hanging = next(member for member in at.pool.spares if not member.is_ready)
        await run(at, 3)
        assert not hanging.is_ready
        await until(lambda: len(at.pool.pids) == 2, "full pool")
        assert hanging.pid not in processes(at)
        name = f"Process 'ForkPoolWorker-{hanging.number + 1}' pid:{hanging.pid}"
        lines = [each.getMessage() for each in caplog.records]
        assert any(line.startswith(f"{name} is not ready after 1") for line in lines)
        assert any(line.startswith(f"{name} was not ready after 2") for line in lines)

    run_loop(body, concurrency=2, main_of_child=counted(tmp_path, before), pool_options={"start_timeout_s": 2.0})


def test_a_replacement_that_hangs_leaves_its_slot_to_the_next_that_is_ready(tmp_path: Path) -> None:
    def before(n: int, number: int) -> None:
        if n in (3, 4):
            time.sleep(60)

    async def body(at: Running) -> None:
        await run(at, 1, "die")  # the third child hangs
        await run(at, 2)
        await until(lambda: len(at.pool.pids) == 2, "full pool")

    run_loop(
        body,
        concurrency=2,
        main_of_child=counted(tmp_path, before),
        tasks={"die": {"requeue_lost": False}},
        pool_options={"start_timeout_s": 1.0},
    )


@pytest.mark.parametrize("where", ["before", "after_in_parent", "after_in_child"])
def test_a_hook_for_forks_that_hangs_is_ended_or_its_child_is(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fastq.pool.zygote.HOOK_S", 0.3)
    here, armed, hung = os.getpid(), [True], tmp_path / "hung"

    def hang() -> None:
        family = (os.getpid(), os.getppid())
        is_there = here not in family if where == "after_in_child" else family[1] == here
        if armed and is_there and not hung.exists():
            hung.touch()
            time.sleep(60)

    os.register_at_fork(**{where: hang})

    async def body(at: Running) -> None:
        await run(at, 3)
        await until(lambda: len(at.pool.pids) == 2, "full pool")
        assert hung.exists()

    try:
        run_loop(body, concurrency=2, pool_options={"start_timeout_s": 1.5})
    finally:
        armed.clear()


def test_a_fork_that_hangs_in_c_is_told_and_ends_a_worker_without_children(caplog: pytest.LogCaptureFixture) -> None:
    async def body(at: Running) -> None:
        os.kill(at.pool.zygote.pid, signal.SIGSTOP)
        at.pool.grow()
        await until(lambda: "has not done so for 0." in caplog.text, "warning")
        await run(at, 1)
        assert not [event for event in at.hooks.events if event[0] == "fatal"]
        os.kill(at.pool.pids[0], signal.SIGKILL)
        await until(lambda: bool(at.hooks.events), "end")
        assert at.hooks.events[0][1].startswith("the process that forks children hangs: none was started for")
        os.kill(at.pool.zygote.pid, signal.SIGCONT)
        await until(lambda: len(at.pool.pids) == 2, "second child")

    run_loop(body, pool_options={"start_timeout_s": 0.5})


# --- replacements


def test_children_due_together_are_replaced_together(tmp_path: Path) -> None:
    def before(n: int, number: int) -> None:
        time.sleep(0.6)

    async def body(at: Running) -> None:
        await until(lambda: len(at.pool.pids) == 6, "full pool")
        begun = time.monotonic()
        await run(at, 12, "sleep", 0.1)
        took = time.monotonic() - begun
        # The first six at once, the others after one start, not after six.
        assert took < 2.4, f"{took:.1f} s"

    run_loop(body, concurrency=6, keeps_spare=True, max_tasks_per_child=1, main_of_child=counted(tmp_path, before))


def test_without_overlap_a_replacement_starts_when_the_old_child_has_ended(tmp_path: Path) -> None:
    def before(n: int, number: int) -> None:
        file = os.open(tmp_path / f"lock{number}", os.O_CREAT | os.O_RDWR)
        os.set_inheritable(file, False)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os._exit(4)

    async def body(at: Running) -> None:
        await run(at, 20)
        at.pool.restart()
        await run(at, 20)

    run_loop(
        body,
        concurrency=2,
        max_tasks_per_child=2,
        main_of_child=counted(tmp_path, before),
        pool_options={"overlaps": False},
    )
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith("lock")) == ["lock0", "lock1"]


def test_numbers_of_living_children_are_unique_and_low(tmp_path: Path) -> None:
    def before(n: int, number: int) -> None:
        file = os.open(tmp_path / f"lock{number}", os.O_CREAT | os.O_RDWR)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises when another living child has the number

    async def body(at: Running) -> None:
        await run(at, 60)
        assert at.hooks.lost == []

    run_loop(body, concurrency=2, keeps_spare=True, max_tasks_per_child=1, main_of_child=counted(tmp_path, before))
    # Beside the newest one at most four live, two at work and two that are just ending, born with four other numbers;
    # and those at work have the numbers of their slots.
    assert max(int(name[4:]) for name in os.listdir(tmp_path) if name.startswith("lock")) <= 4 + 2


def test_children_at_work_have_the_numbers_of_slots(tmp_path: Path) -> None:
    def numbers(at: Running) -> list[int]:
        return sorted(slot.member.number for slot in at.pool.slots if slot.member is not None and not slot.is_due)

    async def body(at: Running) -> None:
        for _ in range(20):
            await run(at, 3)
            assert set(numbers(at)) <= {0, 1, 2}
            assert len(set(numbers(at))) == len(numbers(at))
        # One that is to go finishes its call first: nobody gets its number until then.
        await until(lambda: numbers(at) == [0, 1, 2], "full pool")
        tags = [at.broker.put("sleep", 0.5) for _ in range(3)]
        await until(lambda: sum(member.child.busy for member in at.pool._members.values()) == 3, "three calls run")
        at.pool.shrink(2)
        at.pool.grow(1)
        await until(lambda: at.pool.size == 2, "two slots")
        assert sorted([*numbers(at), *(each.number for each in at.pool._dropped)]) == [0, 1, 2]
        await at.broker.until(lambda: all(at.broker.verdict(tag) == ACK for tag in tags), 20)

    run_loop(body, concurrency=3, keeps_spare=True, max_tasks_per_child=1)


def test_200_replacements_leave_no_descriptor_and_no_mapping(tmp_path: Path) -> None:
    def kept() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count("memfd:fastq-child")

    def is_quiet(at: Running) -> bool:
        living = at.pool._members.values()
        return len(living) == 3 and all(each.is_ready and not each.is_leaving for each in living)

    async def body(at: Running) -> None:
        gc.disable()  # it hides what only it would find
        try:
            await run(at, 20)
            await until(lambda: is_quiet(at), "end of the old children")
            before = kept()
            await run(at, 200)
            await until(lambda: is_quiet(at), "end of the old children")
            await until(lambda: kept() <= before, f"end of what was opened: {before}, now {kept()}", 5)
        finally:
            gc.enable()

    run_loop(body, concurrency=2, keeps_spare=True, max_tasks_per_child=1)


def test_a_dead_childs_socket_is_closed_though_a_process_that_it_has_forked_holds_the_other_end(tmp_path: Path) -> None:
    def before(n: int, number: int) -> None:
        if n <= 3 and os.fork() == 0:
            time.sleep(20)
            os._exit(0)

    async def body(at: Running) -> None:
        gc.disable()
        try:
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(3):
                await run(at, 1, "die")
            await until(lambda: len(at.pool.pids) == 1, "full pool")
            await until(lambda: len(os.listdir("/proc/self/fd")) <= before, "closing of the sockets", 5)
        finally:
            gc.enable()

    run_loop(body, main_of_child=counted(tmp_path, before), tasks={"die": {"requeue_lost": False}})


# --- size

SOURCE = """
from fastq import FastQ
app = FastQ("tasks", broker="sqlite:///tasks.db")
"""


def test_signals_to_grow_and_shrink_leave_no_child_over(start_worker: Callable[..., WorkerProcess]) -> None:
    worker = start_worker("-c", "2", source=SOURCE)
    for _ in range(30):
        worker.signal(signal.SIGTTIN)
        worker.signal(signal.SIGTTOU)

    def has_one() -> bool:
        worker.signal(signal.SIGTTOU)  # signals that wait together are one: how many came is not known
        return len(worker.children()) == 1

    wait_until(has_one, 20, lambda: AssertionError(f"children {worker.children()}"))
    assert worker.stop() == 0


def test_a_worker_of_which_no_child_is_ever_ready_ends_and_says_why(start_worker: Callable[..., WorkerProcess]) -> None:
    source = SOURCE + "import os\nmain = os.getpid()\nzygote = []\n"
    source += "os.register_at_fork(after_in_child=lambda: os._exit(5) if zygote else zygote.append(1))\n"
    worker = start_worker("-c", "2", source=source, await_ready=False)
    assert worker.wait(20) != 0
    assert "none was ever ready, the last one exited with 'exitcode 5' before it was ready" in worker.log()
    assert worker.log().count("another one is started in") == 8
    worker.wait_for_no_leftovers()


def test_growing_and_shrinking_back_to_back_leaves_no_child_over() -> None:
    async def body(at: Running) -> None:
        for _ in range(30):
            at.pool.grow()
            at.pool.shrink()
        for _ in range(5):
            at.pool.grow(5)
            await asyncio.sleep(0.002)
            at.pool.shrink(5)
        await until(lambda: len(processes(at)) == 2 and not at.pool.spares, "pool of two")
        assert at.pool.size == len(at.pool.pids) == 2
        await run(at, 10)

    run_loop(body, concurrency=2)


def test_a_dropped_child_at_work_counts_when_the_pool_grows_again() -> None:
    async def body(at: Running) -> None:
        for _ in range(6):
            at.broker.put("sleep", 0.5)
        await until(lambda: sum(child.busy for child in at.core.children) == 2, "two running calls")
        most = 0
        for _ in range(3):
            at.pool.shrink()
            at.pool.grow()
            for _ in range(20):
                await asyncio.sleep(0.01)
                most = max(most, sum(1 for child in at.core.children if child.busy))
        await until(lambda: len(at.broker.settled) == 6, "end of all calls")
        assert most == 2
        await until(lambda: len(processes(at)) == 2, "pool of two")

    run_loop(body, concurrency=2)


def test_an_idle_child_is_dropped_before_one_at_work() -> None:
    async def body(at: Running) -> None:
        tag = at.broker.put("sleep", 0.5)
        await until(lambda: any(child.busy for child in at.core.children), "running call")
        busy = next(child.pid for child in at.core.children if child.busy)
        at.pool.shrink(2)
        assert at.pool.pids == [busy]
        await at.broker.until(lambda: at.broker.verdict(tag) == ACK)
        await until(lambda: processes(at) == [busy], "end of the idle ones")

    run_loop(body, concurrency=3)


def test_of_idle_children_those_with_the_highest_numbers_are_dropped() -> None:
    async def body(at: Running) -> None:
        await until(lambda: len(at.pool.pids) == 4, "full pool")
        at.pool.slots.reverse()  # as after replacements, which have any slot
        at.pool.shrink(2)
        assert sorted(slot.member.number for slot in at.pool.slots if slot.member is not None) == [0, 1]
        await until(lambda: len(processes(at)) == 2, "end of the others")

    run_loop(body, concurrency=4)


def test_many_children_asked_for_at_once_are_no_error() -> None:
    async def body(at: Running) -> None:
        at.pool.grow(100)
        assert len(at.pool._requests) <= supervisor.MAX_ASKED
        await until(lambda: len(at.pool.pids) == 101, "101 children", 60)

    run_loop(body, timeout_s=90)
