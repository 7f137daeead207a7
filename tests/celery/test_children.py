"""What user code finds in a child: the same in a FastQ application, in a Celery one, and under Celery itself."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery.result import AsyncResult

from tests.celery.conftest import stages
from tests.celery.stage import CeleryStage, Servers, opened
from tests.support.worker_process import has_ended

APPS = {"celery": "tests.celery.apps.children", "fastq": "tests.celery.apps.children_fastq"}
LIMIT_KIB = 250 << 10
SPAWN = ("--pool-start-method", "spawn")
#: Runner, broker, result store, application, and options of the worker's.
KINDS = [
    *[
        pytest.param((*param.values[0], "celery"), id=param.id, marks=param.marks)
        for param in stages(("redis", "redis"))
    ],
    pytest.param(("fastq", "redis", "redis", "fastq"), id="fastq_application", marks=pytest.mark.redis),
    pytest.param(("fastq", "redis", "redis", "celery", *SPAWN), id="spawned", marks=pytest.mark.redis),
    pytest.param(("fastq", "redis", "redis", "fastq", *SPAWN), id="fastq_application-spawned", marks=pytest.mark.redis),
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Runner, application, and options of the worker's."""
    runner, _, _, *more = request.param
    return runner, *more


@pytest.fixture(scope="module")
def stage(kind: tuple[str, ...], servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CeleryStage]:
    runner, application, *words = kind
    with opened(servers, tmp_path_factory, runner, "redis", "redis") as stage:  # type: ignore[arg-type]
        stage.start_worker(*words, "-c", "1", "--max-memory-per-child", str(LIMIT_KIB), app=APPS[application])
        yield stage


def send(stage: CeleryStage, name: str, *args: Any, **options: Any) -> AsyncResult:
    return stage.client.send_task(name, args, **options)


def ask(stage: CeleryStage, name: str, *args: Any, **options: Any) -> Any:
    return stage.get(send(stage, name, *args, **options))


def test_a_child_has_a_number_and_a_group(stage: CeleryStage, kind: tuple[str, ...]) -> None:
    runner, application, *_ = kind
    found = ask(stage, "identity")
    assert (found["name"], found["index"], found["identity"]) == ("ForkPoolWorker-1", 0, [1])
    assert found["daemon"] is (application == "celery")
    assert found["leads"] is (runner == "fastq")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_what_a_task_has_forked(stage: CeleryStage, signum: int) -> None:
    assert ask(stage, "fork_and_signal", int(signum)) < 3


def test_programs_live_through_ctrl_c_and_end_at_term(stage: CeleryStage) -> None:
    assert ask(stage, "program_after", "INT") == "lives\n"
    assert ask(stage, "program_after", "TERM") == ""


def test_there_is_nothing_to_read(stage: CeleryStage) -> None:
    assert ask(stage, "read_stdin") == ["", "/dev/null"]


def test_programs_get_no_descriptor_of_the_worker(stage: CeleryStage, kind: tuple[str, ...]) -> None:
    if kind[0] == "fastq":  # Celery's children pass on their pipes
        assert ask(stage, "passed_on") == []


def test_the_soft_limit_comes_to_a_task_that_uses_the_alarm(stage: CeleryStage) -> None:
    limited = stage.error(send(stage, "sleep_with_alarm_used", soft_time_limit=1))
    assert type(limited).__name__ == "SoftTimeLimitExceeded"
    ask(stage, "leave_handler", soft_time_limit=60)
    # The application's handler is not the limit's, and its timer runs on.
    limited = stage.error(send(stage, "sleep", 20, soft_time_limit=1))
    assert type(limited).__name__ == "SoftTimeLimitExceeded"
    assert ask(stage, "timer_left") > 200


@pytest.mark.parametrize("by", ["id", "stamp"])
@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_terminated_call_cleans_up_and_is_no_error(
    stage: CeleryStage, kind: tuple[str, ...], name: str, by: str
) -> None:
    if kind[0] == "celery" and name == "INT":
        pytest.skip("Celery's children ignore it, and so the call runs on")
    mark = f"{name} by {by}"
    signature = stage.client.signature("hold_and_clean_up", (mark,))
    signature.stamp(wanted=mark)
    call = signature.apply_async()
    stage.wait_for_notes("holding", mark=mark)
    began = time.monotonic()
    if by == "id":
        stage.client.control.revoke(call.id, terminate=True, signal=f"SIG{name}")
    else:
        stage.client.control.revoke_by_stamped_headers({"wanted": [mark]}, terminate=True, signal=f"SIG{name}")
    stage.wait_for_notes("cleaned up", mark=mark)
    assert stage.notes("interrupted", mark=mark)[0]["by"] == "SystemExit"
    assert type(stage.error(call)).__name__ in ("TaskRevokedError", "TaskRevoked")
    assert time.monotonic() - began < 4
    ask(stage, "identity")  # another child
    if by == "id" or kind[0] == "fastq":  # Celery says nothing of stamps
        stage.worker.wait_for_log(rf"INFO/MainProcess\] Terminating {call.id}")
    assert "exited with" not in stage.worker.log()
    assert "ERROR/MainProcess" not in stage.worker.log()


def test_a_call_that_swallows_the_end_is_over_all_the_same(stage: CeleryStage, kind: tuple[str, ...]) -> None:
    if kind[0] == "celery":
        pytest.skip("Celery takes the value")
    call = send(stage, "swallow", "swallowed")
    stage.wait_for_notes("holding", mark="swallowed")
    began = time.monotonic()
    stage.client.control.revoke(call.id, terminate=True, signal="SIGTERM")
    assert type(stage.error(call)).__name__ in ("TaskRevokedError", "TaskRevoked")
    assert time.monotonic() - began < 4


def test_usr1_is_the_soft_limit_of_celery_s_tasks(stage: CeleryStage, kind: tuple[str, ...]) -> None:
    if kind[1] == "fastq":
        pytest.skip("there it asks for stacks")
    call = send(stage, "hold_and_clean_up", "usr1")
    stage.wait_for_notes("holding", mark="usr1")
    stage.client.control.revoke(call.id, terminate=True, signal="SIGUSR1")
    stage.wait_for_notes("cleaned up", mark="usr1")
    assert stage.notes("interrupted", mark="usr1")[0]["by"] == "SoftTimeLimitExceeded"
    ask(stage, "identity")


def test_what_a_killed_child_has_started_dies_with_it(stage: CeleryStage, kind: tuple[str, ...]) -> None:
    if kind[0] == "celery":
        pytest.skip("Celery leaves it running")
    call = send(stage, "start_and_hold", "limit", time_limit=1)
    program = stage.wait_for_notes("started", mark="limit")[0]["program"]
    stage.error(call)
    stage.until(lambda: has_ended(program), "the program has ended")
    # Where it was, in one record.
    stage.worker.wait_for_log(rf"WARNING/MainProcess\] Stacks .*{call.id}\] [^\[]*in start_and_hold")


def test_a_child_beyond_its_memory_says_so_and_the_next_one_has_its_number(
    stage: CeleryStage, kind: tuple[str, ...]
) -> None:
    first = ask(stage, "identity")
    assert ask(stage, "allocate", 300) == first["pid"]
    if kind[0] == "fastq":  # Celery says it only with MP_LOG
        stage.worker.wait_for_log(
            rf"WARNING.*child process exiting after exceeding memory limit \(\d+KiB / {LIMIT_KIB}KiB\)"
        )
    second = ask(stage, "identity")
    assert second["pid"] != first["pid"]
    assert second["index"] == 0


def test_threads_have_a_second_to_flush_at_a_warm_stop(stage: CeleryStage) -> None:
    ask(stage, "leave_thread", "stop")
    assert stage.worker.stop() == 0
    assert stage.notes("flushed", mark="stop")


def test_records_reach_the_user_s_own_handlers_with_task_and_process(stage: CeleryStage, kind: tuple[str, ...]) -> None:
    if kind[0] == "celery":
        pytest.skip("Celery adds the task when its own formatter writes the record")
    stage.worker.kill9()  # the one of the other tests
    settings = {"worker_hijack_root_logger": False}
    own = {"OWN_HANDLERS": "1", "MP_LOG": "1"}  # they get the ready line, too, and what billiard says
    words = ("-c", "1", "--max-memory-per-child", str(LIMIT_KIB))
    stage.start_worker(*kind[2:], *words, app=APPS[kind[1]], settings=settings, env=own, await_ready=False)
    logger = "celery.task" if kind[1] == "celery" else "fastq.task.mine"
    call = send(stage, "log", logger)
    stage.get(call)
    (record,) = stage.wait_for_notes("record", logger=logger)
    assert (record["process"], record["task"]) == ("ForkPoolWorker-1", ["log", call.id])
    if kind[1] == "celery":
        ask(stage, "allocate", 300)

        def said() -> list[str]:
            return [each["text"] for each in stage.notes("record", logger="multiprocessing")]

        stage.until(lambda: any("exceeding memory limit" in each for each in said()), "what billiard says")
