"""Events beside Celery's: the same fields as a stock worker's, digested by Celery's State, shown by Celery's tools."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest

from fastq import FastQ
from fastq.wire.message import encode_properties
from fastq.worker.remote.events import Events
from fastq.worker.remote.mingle import mingle
from tests import ROOT
from tests.celery.conftest import OpenStage
from tests.celery.herald import Capture, Event, Herald
from tests.celery.stage import CeleryStage, Servers, opened
from tests.support.servers import wait_until
from tests.support.worker_process import Program

TASKS = "tests.celery.proj.tasks"
#: Fields of a task's events that are another run's own.
DIFFERS = {
    *("hostname", "pid", "clock", "timestamp", "local_received", "uuid", "root_id", "parent_id"),
    *("eta", "expires", "runtime", "traceback"),
}


BROKERS = [pytest.param("amqp", marks=pytest.mark.rabbitmq), pytest.param("redis", marks=pytest.mark.redis)]


@pytest.fixture(params=BROKERS)
def stage(request: pytest.FixtureRequest, open_stage: OpenStage) -> CeleryStage:
    """A broker and a Celery client."""
    return open_stage("celery", request.param, "disabled")


@pytest.fixture
def herald(stage: CeleryStage) -> Iterator[Herald]:
    """Events of a worker that has nothing else."""
    with Herald(stage.broker_url) as herald:
        yield herald


# -- the same fields


class Told(NamedTuple):
    """What a worker told while it ran the same tasks as the other one."""

    by_kind: dict[str, Event]
    by_call: dict[str, list[Event]]


@pytest.fixture(scope="module", params=BROKERS)
def both(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Told, Told]]:
    """What a stock worker and one of ours tell of the same tasks."""
    with opened(servers, tmp_path_factory, "celery", request.param, "disabled") as stage:
        with Capture(stage.client) as capture:
            theirs = run_everything(stage, capture, "celery")
        with Capture(stage.client) as capture:
            ours = run_everything(stage, capture, "fastq")
        yield theirs, ours


def run_everything(stage: CeleryStage, capture: Capture, runner: Program) -> Told:
    """Have a worker run a task for each way in which one can end, and return what it told."""
    worker = stage.start_worker("-E", "-n", f"{runner}@h", "-c", "1", runner=runner)
    calls = {
        "added": stage.send("add", 1, 2, countdown=0.2, expires=60),
        "failed": stage.send("fail", "ValueError", "no"),
        "retried": stage.send("retry_until", 1, 0.3),
        "rejected": stage.send("reject", False),
        "ignored": stage.send("ignore"),
        "expired": stage.send("add", 1, 2, countdown=2, expires=1),
    }
    capture.until("task-revoked")
    for kind, count in {"task-succeeded": 2, "task-failed": 1, "task-retried": 1, "task-rejected": 1}.items():
        capture.until(kind, count)
    calls["terminated"] = held = stage.send("hold", str(stage.gate()))
    wait_until(
        lambda: any(each["uuid"] == held.id for each in capture.of("task-started")),
        20,
        lambda: TimeoutError(stage.logs()),
    )
    stage.client.control.revoke(held.id, terminate=True)
    capture.until("task-revoked", 2)
    capture.until("worker-heartbeat")
    worker.stop()
    capture.until("worker-offline")
    by_call = {name: [each for each in capture.events if each.get("uuid") == call.id] for name, call in calls.items()}
    first = [*capture.events, *(each for name in ("added", "failed", "retried", "expired") for each in by_call[name])]
    by_kind = {each["type"]: each for each in first}
    by_kind["task-received"] = by_call["added"][0]
    return Told(by_kind, by_call)


def headers(task_id: str, name: str, **more: Any) -> bytes:
    """Return the properties of a task message as Celery writes them."""
    fields = {"task": name, "id": task_id, "root_id": task_id, "parent_id": None, "retries": 0, **more}
    return encode_properties({"content_type": "application/json", "headers": fields})


def tell_everything(events: Events) -> None:
    """Have one event of each kind sent, as a worker would whose tasks do what those of the stock worker did."""
    eta = "2026-11-22T10:00:00.500000+00:00"
    described = {"argsrepr": "(1, 2)", "kwargsrepr": "{}", "eta": eta, "expires": "2033-11-22T10:00:00+00:00"}
    raised = orjson.dumps({"exception": "ValueError('no')", "traceback": "Traceback (most recent call last):\n"})
    events.received(headers("id-1", f"{TASKS}.add", **described), b"[[1,2],{},{}]", f"{TASKS}.add", "id-1")
    events.started("id-1", 7)
    events.finished("id-1", f"{TASKS}.add", "SUCCESS", '{"result": "3"}', 0.012)
    events.finished("id-2", f"{TASKS}.fail", "FAILURE", raised.decode(), 0.012)
    events.finished("id-3", f"{TASKS}.retry_until", "RETRY", raised.decode(), 0.012)
    events.finished("id-4", f"{TASKS}.reject", "REJECTED", '{"requeue": false}', 0.012)
    events.revoked("id-5", terminated=False, signum=None, expired=True)
    events.cancelled("id-6")


def types(event: Event) -> dict[str, Any]:
    return {name: type(value) for name, value in event.items()}


@pytest.mark.parametrize(
    "kind",
    [*(f"task-{end}" for end in ("received", "started", "succeeded", "failed", "retried", "rejected", "revoked")),
     "worker-online", "worker-heartbeat", "worker-offline"],
)  # fmt: skip
def test_an_event_has_the_fields_of_a_stock_worker_s(both: tuple[Told, Told], kind: str) -> None:
    theirs, ours = (told.by_kind[kind] for told in both)
    assert types(ours) == types(theirs)
    if kind.startswith("task"):
        same = theirs.keys() - DIFFERS
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    else:
        assert ours["freq"] == theirs["freq"]
        assert (ours["sw_ident"], theirs["sw_ident"]) == ("fastq", "py-celery")


@pytest.mark.parametrize("call", ["added", "failed", "retried", "rejected", "ignored", "expired", "terminated"])
def test_a_call_is_told_in_the_same_steps(both: tuple[Told, Told], call: str) -> None:
    theirs, ours = ([each["type"] for each in told.by_call[call]] for told in both)
    assert sorted(ours) == sorted(theirs)
    if call != "retried":  # Celery's own order differs from run to run
        assert ours == theirs


@pytest.mark.parametrize("call", ["failed", "retried"])
def test_an_exception_and_its_traceback_read_the_same(both: tuple[Told, Told], call: str) -> None:
    theirs, ours = (next(each for each in told.by_call[call] if "traceback" in each) for told in both)
    assert ours["exception"] == theirs["exception"]
    assert ours["traceback"].splitlines()[0] == theirs["traceback"].splitlines()[0]
    assert ours["traceback"].splitlines()[-1] == theirs["traceback"].splitlines()[-1]


@pytest.mark.parametrize("broker", BROKERS)
def test_a_sent_call_is_told_as_a_stock_client_does(open_stage: OpenStage, broker: str) -> None:
    stage = open_stage("celery", broker, "disabled", task_send_sent_event=True)
    app = FastQ("proj", broker=stage.broker_url, backend="disabled", task_send_sent_event=True)
    options: dict[str, Any] = {"queue": "side", "countdown": 1, "expires": 60}
    with Capture(stage.client) as capture:
        theirs = stage.send("add", 1, 2, **options)
        ours = app.send_task(f"{TASKS}.add", (1, 2), **options)
        told = {each["uuid"]: each for each in capture.until("task-sent", 2)}
    app.close()
    sent, expected = told[ours.id], told[theirs.id]
    assert types(sent) == types(expected)
    same = expected.keys() - DIFFERS
    assert {name: sent[name] for name in same} == {name: expected[name] for name in same}
    assert sent["root_id"] == ours.id


# -- Celery's State


def test_celery_s_state_knows_the_worker_and_its_tasks(stage: CeleryStage, herald: Herald) -> None:
    with Capture(stage.client) as capture:
        herald.do(lambda events: events.heartbeat())
        herald.do(tell_everything)
        capture.until("task-cancelled")
        worker = capture.state.workers[herald.hostname]
        assert worker.alive
        assert (worker.freq, worker.sw_ident, worker.active, worker.processed) == (2.0, "fastq", 0, 0)
        task = capture.state.tasks["id-1"]
        assert (task.state, task.name, task.args, task.kwargs) == ("SUCCESS", f"{TASKS}.add", "(1, 2)", "{}")
        assert (task.result, task.runtime, task.retries) == ("3", 0.012, 0)
        assert task.worker.hostname == herald.hostname
        assert task.received <= task.started <= task.succeeded
        states = {uuid: task.state for uuid, task in capture.state.tasks.items()}
        assert states == {
            "id-1": "SUCCESS",
            "id-2": "FAILURE",
            "id-3": "RETRY",
            "id-4": "REJECTED",
            "id-5": "REVOKED",
            "id-6": "CANCELLED",
        }
        assert capture.state.tasks["id-2"].exception == "ValueError('no')"
        herald.do(lambda events: events.stop())
        capture.until("worker-offline")
        assert not worker.alive


def test_many_events_arrive_whole_and_in_order(stage: CeleryStage, herald: Herald) -> None:
    def tell(events: Events) -> None:
        for number in range(2000):
            events.started(f"id-{number}", 1)

    with Capture(stage.client) as capture:
        herald.do(tell)
        told = capture.until("task-started", 2000)
    assert [event["uuid"] for event in told] == [f"id-{number}" for number in range(2000)]


# -- beside a stock worker that gossips


def test_a_stock_worker_that_gossips_is_not_disturbed(stage: CeleryStage) -> None:
    worker = stage.start_worker("-n", "stock@h", runner="celery", log_level="DEBUG", alone=False)
    with Herald(stage.broker_url, heartbeat_s=0.3) as herald:
        worker.wait_for_log(r"fastq@herald joined the party")
        herald.do(tell_everything)
        herald.do(lambda events: events.send("custom-thing", x=1))
        with Capture(stage.client) as capture:
            capture.until("worker-heartbeat", 4, herald.hostname)
            stage.send("add", 1, 2)
            worker.wait_for_log(r"add\[\S+\] succeeded")
    worker.wait_for_log(r"fastq@herald left")
    assert worker.stop() == 0
    assert not re.search(r"ERROR|CRITICAL|Traceback|missed heartbeat", worker.log()), worker.log()[-4000:]


def test_mingle_takes_what_a_stock_worker_knows_and_tells_what_we_know(stage: CeleryStage, herald: Herald) -> None:
    worker = stage.start_worker("-n", "stock@h", runner="celery")
    revoked = [f"theirs-{number}" for number in range(3)]
    for each in revoked:
        stage.client.control.revoke(each, reply=True)
    taken: list[str] = []
    before = herald.clock.value
    count = herald.wait(mingle(herald.bus, herald.hostname, "i-1", herald.clock, ["ours"], taken.extend))
    assert count == 1
    assert sorted(taken) == sorted([*revoked, "ours"])
    assert herald.clock.value > before
    assert "ours" in stage.client.control.inspect().revoked()["stock@h"]
    assert worker.stop() == 0
    assert not re.search(r"ERROR|Traceback", worker.log()), worker.log()[-4000:]


@pytest.mark.parametrize(("first", "second"), [("celery", "fastq"), ("fastq", "celery")])
def test_workers_of_both_kinds_mingle(stage: CeleryStage, first: Program, second: Program) -> None:
    old = stage.start_worker("-n", f"{first}@h", runner=first)
    stage.client.control.revoke("taken-back", reply=True)
    new = stage.start_worker("-n", f"{second}@h", runner=second, alone=False)
    new.wait_for_log("mingle: sync with 1 nodes")
    new.wait_for_log("mingle: sync complete")
    revoked = stage.client.control.inspect().revoked()
    assert revoked == {f"{first}@h": ["taken-back"], f"{second}@h": ["taken-back"]}
    for worker in (old, new):
        assert worker.stop() == 0
        assert not re.search(r"ERROR|Traceback", worker.log()), worker.log()[-4000:]


def test_a_worker_alone_says_so(stage: CeleryStage) -> None:
    worker = stage.start_worker("-n", "fastq@h", runner="fastq", alone=False)
    worker.wait_for_log("mingle: all alone")
    quiet = stage.start_worker("-n", "quiet@h", "--without-mingle", runner="fastq", alone=False)
    assert worker.stop() == quiet.stop() == 0
    assert "mingle" not in quiet.log()


# -- tools


@pytest.fixture
def run_tool(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], Callable[[], str]]]]:
    """A function that starts `python -m ...` and returns it with what reads its output; it is killed afterwards."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[bytes], Callable[[], str]]:
        file = tmp_path / f"tool{len(running)}.log"
        with file.open("wb") as log:
            process = subprocess.Popen([sys.executable, "-u", "-m", *arguments], cwd=ROOT, stdout=log, stderr=log)
        running.append(process)
        return process, lambda: file.read_text(encoding="utf-8", errors="replace")

    yield start
    for process in running:
        process.kill()
        process.wait()


def shown(text: str) -> list[str]:
    """Return the lines of a dump, without what differs from run to run."""
    lines = [re.sub(r"\[[^]]*\]|clock=\d+|(timestamp|local_received)=[\d.]+|loadavg=\S+, \S+, \S+", "", line)
             for line in text.splitlines()]  # fmt: skip
    return [line for line in lines if "fastq@herald" in line and "heartbeat" not in line]


def test_our_dump_and_celery_s_show_the_same(stage: CeleryStage, run_tool: Any) -> None:
    dumps = [
        run_tool("celery", "-b", stage.broker_url, "events", "--dump"),
        run_tool("fastq", "-b", stage.broker_url, "events", "--dump"),
    ]
    with Herald(stage.broker_url, heartbeat_s=0.2) as herald:
        for _, read in dumps:
            wait_until(lambda read=read: "fastq@herald" in read(), 20, lambda read=read: TimeoutError(read()))
        herald.do(tell_everything)
    for _, read in dumps:
        wait_until(lambda read=read: "shutdown" in read(), 20, lambda read=read: TimeoutError(read()))
    (_, read_theirs), (_, read_ours) = dumps
    # What comes from outside has no line of its own in ours.
    theirs, ours = shown(read_theirs()), shown(read_ours().replace("\\n", "\n"))
    assert [line for line in ours if "task " in line] == [line for line in theirs if "task " in line]
    assert len([line for line in ours if "task " in line]) == 8
    assert ours[-1] == theirs[-1]
    for process, read in dumps:
        assert process.poll() is None, read()


def test_the_dump_goes_on_after_the_broker_was_away(run_tool: Any, open_stage: OpenStage) -> None:
    stage = open_stage("celery", "amqp", "disabled")
    process, read = run_tool("fastq", "-b", stage.broker_url, "events", "--dump")
    with Herald(stage.broker_url, heartbeat_s=0.2):
        wait_until(lambda: "fastq@herald" in read(), 20, lambda: TimeoutError(read()))
        assert stage.rabbitmq is not None
        stage.rabbitmq.close_connections()
        wait_until(lambda: "attempting reconnect" in read(), 20, lambda: TimeoutError(read()))
    with Herald(stage.broker_url, "fastq@second", heartbeat_s=0.2):
        wait_until(lambda: "fastq@second" in read(), 20, lambda: TimeoutError(read()))
    assert process.poll() is None


def test_without_dump_there_is_a_short_line_for_each_task_that_ends(stage: CeleryStage, run_tool: Any) -> None:
    process, read = run_tool("fastq", "-b", stage.broker_url, "events")
    with Herald(stage.broker_url, heartbeat_s=0.2) as herald:

        def tell_until_heard() -> bool:
            herald.do(tell_everything)
            return "succeeded" in read()

        wait_until(tell_until_heard, 20, lambda: TimeoutError(read()))
    line = next(line for line in read().splitlines() if " succeeded " in line)
    assert re.fullmatch(r"\d\d:\d\d:\d\d succeeded \S+\[\S+\] fastq@herald [\d.]+ m?s", line), line
    assert "heartbeat" not in read()
    assert process.poll() is None


def test_the_screen_and_cameras_of_a_celery_application_are_celery_s(run_tool: Any) -> None:
    done = run_tool("fastq", "-A", "tests.celery.proj", "events", "--camera", "no.such.Camera")
    assert done[0].wait(30) == 69  # Celery's code for it
    assert "evcam: Taking snapshots with no.such.Camera" in done[1]()


# A process group's leader that opens a terminal has it as its own, and gets its Ctrl-C, whatever started these tests.
ON_TERMINAL = (
    "import os, signal, sys; os.open(os.ttyname(0), os.O_RDWR); signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


@pytest.mark.parametrize("program", ["celery", "fastq"], ids=["under_celery", "under_fastq"])
def test_the_screen_of_a_celery_application_shows_a_task_and_ends_with_ctrl_c(
    stage: CeleryStage, program: Program
) -> None:
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", ON_TERMINAL, "-m", program, "-A", "tests.celery.proj", "events"],
        cwd=ROOT,
        env={**os.environ, **stage.environment(), "TERM": "xterm"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    os.set_blocking(screen, False)
    shown, pressed = bytearray(), [0.0]

    def shows(text: str) -> bool:
        with contextlib.suppress(OSError):  # nothing there, or the terminal closed
            shown.extend(os.read(screen, 65536))
        return text.encode() in shown

    def pressed_ctrl_c() -> bool:
        # Again and again, as people do: what is interrupted may be the farewell itself.
        if time.monotonic() - pressed[-1] > 5:
            pressed.append(time.monotonic())
            with contextlib.suppress(OSError):  # it has ended just now
                os.write(screen, b"\x03")
        return True

    def failed() -> TimeoutError:
        return TimeoutError(shown[-2000:].decode(errors="replace"))

    try:
        with Herald(stage.broker_url, heartbeat_s=0.2) as herald:
            wait_until(lambda: shows("fastq@herald"), 30, failed)
            herald.do(tell_everything)
            wait_until(lambda: shows("SUCCESS"), 20, failed)
            # While events go on, as beside real workers: the screen's farewell to a silent broker may wait for ever.
            wait_until(lambda: pressed_ctrl_c() and shows("") and process.poll() is not None, 30, failed)
        assert shown.rfind(b"\x1b[?1049l") > shown.rfind(b"\x1b[?1049h"), "the screen from before is back"
    finally:
        process.kill()
        process.wait(20)
        os.close(screen)


@pytest.mark.parametrize("option", [["--camera", "mod.Camera"], ["-F", "2"], ["-r", "10/m"], ["--detach"]])
def test_what_needs_celery_s_objects_names_celery_s_own_command(run_tool: Any, option: list[str]) -> None:
    process, read = run_tool("fastq", "-b", "amqp://127.0.0.1:1//", "events", *option)
    assert process.wait(20) == 2
    assert "celery -A <module> events" in read()
    assert len(read().splitlines()) == 1
