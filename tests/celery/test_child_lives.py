"""One child after the other, and the end of the last: their numbers, their standard input, what they leave running."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
from typing import Any

import pytest

from tests.celery.test_children import APPS, KINDS
from tests.support.worker_process import has_ended

every_kind = pytest.mark.parametrize("kind", KINDS)
#: Where Celery's children do less.
our_kinds = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.values[0][0] == "fastq"])


@every_kind
def test_recycled_children_have_the_numbers_of_their_slots(open_stage: Any, kind: Any) -> None:
    runner, application, words = kind[0], kind[3], kind[4:]
    stage = open_stage(*kind[:3])
    worker = stage.start_worker(
        *("-c", "2", "--max-tasks-per-child", "1", "-n", "w@h", "-f", "%n%I.log"),
        *words,
        app=APPS[application],
        await_ready=False,
    )
    for _ in range(5):
        gate = stage.gate()
        calls = [stage.client.send_task("hold_identity", (str(gate),)) for _ in range(2)]
        stage.wait_for_notes("holding", 2, mark=str(gate))
        gate.touch()
        found = sorted((stage.get(call) for call in calls), key=lambda each: each["index"])
        assert [each["index"] for each in found] == [0, 1]
        for number, each in enumerate(found, 1):
            own = (worker.folder / f"w-{number}.log").read_text(encoding="utf-8")
            (line,) = [line for line in own.splitlines() if f"pid {each['pid']} holds" in line]
            if runner == "fastq":  # under Celery the names count on
                assert (each["name"], each["identity"]) == (f"ForkPoolWorker-{number}", [number])
                assert each["title"].endswith(f":ForkPoolWorker-{number}]")
                assert f"WARNING/ForkPoolWorker-{number}]" in line
    # Spares have numbers of their own until they have a slot: three times the pool's size, and one.
    assert len(list(worker.folder.glob("w-*.log"))) <= (2 if runner == "celery" else 7)


@our_kinds
def test_threads_have_a_second_to_flush_when_their_child_is_replaced(open_stage: Any, kind: Any) -> None:
    application, words = kind[3], kind[4:]
    stage = open_stage(*kind[:3])
    stage.start_worker("-c", "1", "--max-tasks-per-child", "1", *words, app=APPS[application])
    pids = [stage.get(stage.client.send_task("leave_thread", (f"turn {turn}",))) for turn in range(2)]
    assert pids[0] != pids[1]
    for turn in range(2):
        stage.wait_for_notes("flushed", mark=f"turn {turn}")


@pytest.mark.redis
def test_without_a_spare_the_next_child_begins_when_the_last_thread_has_flushed(open_stage: Any) -> None:
    """As under Celery: what the last one held is free."""
    stage = open_stage("fastq", "redis", "redis")
    worker = stage.start_worker(
        *("-c", "1", "--max-tasks-per-child", "1"), app=APPS["celery"], settings={"fastq_keeps_spare": False}
    )
    last = stage.get(stage.client.send_task("leave_thread", ("slow end",)))
    alive: list[int] = []

    def has_flushed() -> bool:
        alive.append(sum(not has_ended(pid) for pid in worker.children()))
        return bool(stage.notes("flushed", mark="slow end"))

    stage.until(has_flushed, "the last thread has flushed")
    assert max(alive[:-1]) == 1
    assert stage.get(stage.client.send_task("identity"))["pid"] != last


@our_kinds
def test_descriptor_0_is_at_its_end_though_the_worker_s_is_an_open_pipe(open_stage: Any, kind: Any) -> None:
    application, words = kind[3], kind[4:]
    stage = open_stage(*kind[:3])
    reading, writing = os.pipe()
    try:
        os.write(writing, b"not for tasks\n")
        stage.start_worker("-c", "1", *words, app=APPS[application], stdin=reading)
        assert stage.get(stage.client.send_task("read_descriptor")) == ""
        assert stage.get(stage.client.send_task("read_stdin")) == ["", "/dev/null"]
    finally:
        os.close(reading)
        os.close(writing)


@our_kinds
def test_what_a_task_has_started_dies_at_a_cold_stop(open_stage: Any, kind: Any) -> None:
    application, words = kind[3], kind[4:]
    stage = open_stage(*kind[:3])
    worker = stage.start_worker("-c", "1", *words, app=APPS[application])
    stage.client.send_task("start_and_hold", ("cold",))
    program = stage.wait_for_notes("started", mark="cold")[0]["program"]
    assert not has_ended(program)
    worker.signal(signal.SIGQUIT)
    worker.wait(10)
    stage.until(lambda: has_ended(program), "the program has ended")


@every_kind
def test_ctrl_c_on_a_terminal_lets_a_task_and_its_program_end(open_stage: Any, kind: Any) -> None:
    runner, application, words = kind[0], kind[3], kind[4:]
    stage = open_stage(*kind[:3])
    ours, theirs = pty.openpty()
    try:
        worker = stage.start_worker("-c", "1", *words, app=APPS[application], stdin=theirs)
        gate = stage.gate()
        call = stage.client.send_task("program_until", (str(gate),))
        stage.until(gate.with_name(f"{gate.name}.begun").exists, "the program runs")
        os.write(ours, b"\x03")
        worker.wait_for_log(r"Warm shutdown")
        gate.touch()
        assert stage.get(call) == "lives\n"
        assert worker.wait() == (1 if runner == "celery" else 0)
    finally:
        for end in (ours, theirs):
            with contextlib.suppress(OSError):
                os.close(end)
