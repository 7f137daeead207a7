"""Text from outside in the log and on the terminal: it has no line of its own there, and commands no terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastq.brokers import open_blocking_bus
from fastq.cli import Globals
from fastq.cli.errors import Failure, run_guarded
from fastq.cli.events import Dumper, Summary
from fastq.cli.remote import Printer
from fastq.cli.result import show
from fastq.settings import Settings
from fastq.wire.ids import new_id
from fastq.wire.message import encode_task
from tests.celery.stage import BrokerKind
from tests.support.stage import Kind, open_stage, until
from tests.support.worker_process import WorkerProcess

EVIL = "x\n[2030-01-01 00:00:00,000: INFO/MainProcess] forged\r\x1b[2J\x1b]0;t\x07\x85\u2028\u202ey"
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
FORGED = re.compile(r"^\[2030", re.M)


def assert_harmless(text: str) -> None:
    assert "forged" in text
    assert not COMMANDS.search(text), COMMANDS.search(text)
    assert not FORGED.search(text)


@pytest.mark.parametrize(
    "kind", ["sqlite", pytest.param("amqp", marks=pytest.mark.rabbitmq), pytest.param("redis", marks=pytest.mark.redis)]
)
def test_no_message_writes_a_line_of_its_own_in_the_log(
    kind: Kind, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    stage = open_stage(kind, request, tmp_path)
    try:
        worker = stage.start_worker("-c", "1", "-l", "DEBUG", fastq_max_child_deaths=1)
        body = json.dumps([[0], {}, {}]).encode()
        stage.publish(
            [
                encode_task("work", EVIL, body),
                encode_task(EVIL, new_id(), body),
                encode_task("work", f"{EVIL}2", b"[1, 2, 3]"),
                encode_task("kill_own_child", f"{EVIL}3", body),
                encode_task("work", f"{EVIL}4", body, expires=1.0),
                encode_task("work", f"{EVIL}5", json.dumps([[0, EVIL], {}, {}]).encode()),
                encode_task(EVIL + "long" * 20_000, new_id(), body),
            ]
        )
        stage.wait_for(stage.send(1), 20)
        for words in ("received", "succeeded", "unregistered", "malformed", "prematurely", "revoked"):
            worker.wait_for_log(words)
        log = worker.log()
        assert_harmless(log)
        assert max(map(len, log.splitlines())) < 20_000
    finally:
        stage.close()


@pytest.mark.parametrize(
    "broker", [pytest.param("amqp", marks=pytest.mark.rabbitmq), pytest.param("redis", marks=pytest.mark.redis)]
)
def test_no_command_writes_a_line_of_its_own_in_the_log(
    broker: BrokerKind, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    stage = open_stage(broker, request, tmp_path)
    try:
        worker = stage.start_worker("-c", "1", "-l", "DEBUG")
        bus = open_blocking_bus(stage.url, Settings({"broker_url": stage.url}))
        requests: list[tuple[str, dict[str, Any]]] = [
            (EVIL, {}),
            ("ping", {EVIL: EVIL}),
            ("revoke", {"task_id": [EVIL, f"{EVIL}2"]}),
            ("hello", {"from_node": EVIL, "revoked": [EVIL]}),
            ("rate_limit", {"task_name": EVIL, "rate_limit": EVIL}),
            ("election", {"id": EVIL, "topic": EVIL}),
            ("add_consumer", {"queue": "more\x1b[2J"}),
            ("shutdown", {"msg": EVIL}),
        ]
        for method, arguments in requests:
            list(bus.ask(method, arguments, 0.5, ()))
        bus.close()
        assert worker.wait(30) == 0
        assert_harmless(worker.log())
    finally:
        stage.close()


# --- the terminal


def test_no_reply_writes_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer(Globals(color=False))
    for reply in (EVIL, [EVIL], {"ok": EVIL}, {"error": EVIL}, {"ok": [EVIL]}, {EVIL: EVIL}, [{EVIL: EVIL}]):
        printer.show(EVIL, reply)
    printer.show("node", {"ok": "one\ntwo"})
    out = capsys.readouterr().out
    assert_harmless(out)
    assert "        one\n        two\n" in out  # what has several lines, such as a report, keeps them


@pytest.mark.parametrize("reply", [
    "x" * 1_000_000, "x\n" * 1_000_000, {"ok": "x" * 1_000_000}, {"error": "x" * 1_000_000},
    {"x" * 1_000_000: {"y": ["x" * 1_000_000]}}, ["x" * 1_000_000], {"ok": [{"x": "x" * 1_000_000}]},
])  # fmt: skip
def test_no_reply_fills_the_terminal(reply: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Printer(Globals(color=False)).show("node", reply)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) < 5000
    assert len(out) < 2_000_000
    assert "..." in out


@pytest.mark.parametrize("shower", [Dumper, Summary])
def test_no_event_writes_a_line_of_its_own(shower: Any) -> None:
    lines: list[str] = []
    printer = shower(lines.append)
    event = {"type": "task-received", "uuid": EVIL, "name": EVIL, "args": EVIL, "kwargs": EVIL, "hostname": EVIL}
    printer.show(event | {EVIL: EVIL, "long": "x" * 1_000_000})
    printer.show({"type": "task-failed", "uuid": EVIL, "hostname": EVIL, "exception": EVIL, "timestamp": 1.0})
    assert lines
    assert all("\n" not in line and len(line) < 20_000 for line in lines)
    assert_harmless("\n".join(lines))


def test_no_error_writes_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise Failure(EVIL)

    assert run_guarded(fail) == 1
    assert_harmless(capsys.readouterr().err)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_result_commands_no_terminal_and_stays_as_it_is_in_a_pipe(
    is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    show({"status": "SUCCESS", "result": f"one\n\ttwo {EVIL}", "task_id": "1"}, False)
    show({"status": "FAILURE", "result": None, "traceback": f"one\n  two {EVIL}", "task_id": "1"}, True)
    out = capsys.readouterr().out
    assert ("\x1b" in out) is not is_terminal
    assert "one\n\ttwo" in out


def test_a_log_keeps_what_is_ours(start_worker: Any, sqlite_url: str) -> None:
    """Tracebacks, stacks and what tasks themselves log or print are as they were."""
    source = f"""
import logging
from fastq import FastQ

app = FastQ("lines", broker={sqlite_url!r}, backend="disabled")

@app.task(name="speak")
def speak():
    logging.getLogger("mine").warning("one\\ntwo %s", "three\\nfour \\x1b[31mred")
    print("a \\x1b[32mgreen line")
    raise ValueError("bad")
"""
    worker: WorkerProcess = start_worker("-c", "1", source=source)
    from fastq import FastQ

    client = FastQ("client", broker=sqlite_url, backend="disabled")
    client.send_task("speak")
    worker.wait_for_log("ValueError: bad")
    log = worker.log()
    assert "one\ntwo three\nfour \x1b[31mred" in log
    assert "a \x1b[32mgreen line" in log
    assert "\nTraceback (most recent call last):\n  File" in log
    client.close()
    until(lambda: "raised unexpected" in worker.log(), 5, "the line is there")
