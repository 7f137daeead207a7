"""What the log looks like, where it goes, and how the standard streams become records."""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastq.request import Request, pop_request, push_request
from fastq.running import messages
from fastq.running.messages import TaskLog, retry_reason
from fastq.settings import Settings
from fastq.worker.process.exitcodes import CannotCreate
from fastq.worker.process.log import ChildLogging, Formatter, StreamToLog, open_handler, setup_logging, wants_color

LINE = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}: (\w+)/([\w-]+)\] (.*)")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Give the root logger back what it had; our handlers are closed."""
    root = logging.getLogger()
    handlers, level, fastq_level = root.handlers[:], root.level, logging.getLogger("fastq").level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("fastq").setLevel(fastq_level)


def log_to_text(level: str = "INFO", color: bool | None = False, **settings: object) -> io.StringIO:
    """Set the log up as a worker does, to a text in memory."""
    stream = io.StringIO()
    setup_logging(logging.StreamHandler(stream), level, Settings(settings), color)
    return stream


def fields_of(stream: io.StringIO) -> list[tuple[str, ...]]:
    """Return level, process and message of each line; fail for a line of another shape."""
    matches = [(LINE.fullmatch(line), line) for line in stream.getvalue().splitlines()]
    assert [line for match, line in matches if match is None] == []
    return [match.groups() for match, _ in matches if match]


# -- shape


def test_a_line_has_celery_s_shape() -> None:
    stream = log_to_text()
    logging.getLogger("anything").warning("it is %s", "so")
    assert fields_of(stream) == [("WARNING", "MainProcess", "it is so")]


def test_records_below_the_level_are_left_out() -> None:
    stream = log_to_text("WARNING")
    logging.getLogger("fastq.worker").info("not this")
    logging.getLogger("fastq.worker").error("but this")
    assert [message for _, _, message in fields_of(stream)] == ["but this"]


def test_the_formats_can_be_set() -> None:
    stream = log_to_text(
        worker_log_format="%(levelname)s %(message)s", worker_task_log_format="%(task_id)s %(message)s"
    )
    logging.getLogger("fastq.worker").error("one")
    logging.getLogger("fastq.task.mine").error("two")
    assert stream.getvalue().splitlines() == ["ERROR one", "??? two"]


def test_the_form_of_the_time_can_be_set_for_each_format() -> None:
    stream = log_to_text(
        worker_log_format="%(asctime)s %(message)s",
        worker_task_log_format="%(asctime)s %(message)s",
        worker_log_datefmt="main",
        worker_task_log_datefmt="task",
    )
    logging.getLogger("fastq.worker").error("one")
    logging.getLogger("fastq.task.mine").error("two")
    assert stream.getvalue().splitlines() == ["main one", "task two"]


def test_a_task_s_own_lines_carry_its_name_and_id() -> None:
    stream = log_to_text()
    logger = logging.getLogger("fastq.task.shop")
    push_request(Request.local("shop.pay", (), {}, id="id-7"))
    try:
        logger.info("paid")
    finally:
        pop_request()
    logger.info("outside")
    assert [message for _, _, message in fields_of(stream)] == ["shop.pay[id-7]: paid", "???[???]: outside"]


def test_each_level_has_its_colour_when_asked_for() -> None:
    stream = log_to_text("DEBUG", color=True)
    for level in ("debug", "info", "warning", "error", "critical"):
        getattr(logging.getLogger("fastq.worker"), level)("text")
    assert [line.startswith("\033[") for line in stream.getvalue().splitlines()] == [True, False, True, True, True]
    assert stream.getvalue().count("\033[0m") == 4


@pytest.mark.parametrize(
    ("is_terminal", "environ", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (False, {"FORCE_COLOR": "1"}, True),
        (True, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
    ],
)
def test_colours_follow_the_terminal_and_the_environment(
    is_terminal: bool, environ: dict[str, str], expected: bool
) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    assert wants_color(Stream(), environ) is expected


def test_the_setting_decides_about_colours_before_the_terminal_does() -> None:
    stream = log_to_text(color=None, worker_log_color=True)
    logging.getLogger("fastq.worker").error("red")
    assert "\033[31m" in stream.getvalue()


# -- the root logger


def test_the_root_logger_is_taken_over() -> None:
    own = io.StringIO()
    logging.getLogger().addHandler(logging.StreamHandler(own))
    stream = log_to_text()
    logging.getLogger("user").error("hello")
    assert own.getvalue() == ""
    assert fields_of(stream)[0][2] == "hello"


def test_the_root_logger_keeps_its_handlers_when_it_is_not_to_be_hijacked() -> None:
    own = io.StringIO()
    root = logging.getLogger()
    root.handlers[:] = [logging.StreamHandler(own)]
    root.setLevel("ERROR")
    stream = log_to_text("INFO", worker_hijack_root_logger=False)
    logging.getLogger("fastq.worker").info("ours")
    logging.getLogger("user").info("theirs")
    assert own.getvalue() == "ours\n"
    assert stream.getvalue() == ""


def test_without_hijacking_an_empty_root_logger_gets_the_handler() -> None:
    logging.getLogger().handlers[:] = []
    stream = log_to_text(worker_hijack_root_logger=False)
    logging.getLogger("fastq.worker").info("ours")
    assert fields_of(stream)[0][2] == "ours"


# -- the file


def test_the_log_file_has_mode_0640_and_expands_its_name(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        handler = open_handler(f"{tmp_path}/%n-%p%I.log", "w1@host.example.org")
    finally:
        os.umask(old)
    handler.close()
    (file,) = tmp_path.iterdir()
    assert file.name == "w1-w1@host.example.org.log"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_the_log_file_is_appended_to_and_followed_after_a_rotation(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    path.write_text("from before\n")
    handler = open_handler(str(path), "w@h")
    setup_logging(handler, "INFO", Settings())
    logging.getLogger("fastq.worker").info("one")
    path.rename(tmp_path / "worker.log.1")
    logging.getLogger("fastq.worker").info("two \udcff")
    assert (tmp_path / "worker.log.1").read_text().splitlines()[0] == "from before"
    assert "one" in (tmp_path / "worker.log.1").read_text()
    assert path.read_text().endswith("two \\udcff\n")


def test_a_log_file_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(CannotCreate, match=r"cannot write log file '.*none/x.log'.*--logfile"):
        open_handler(str(tmp_path / "none" / "x.log"), "w@h")


# -- standard streams


def stream_to(text: io.StringIO, original: io.StringIO | None = None) -> StreamToLog:
    logger = logging.getLogger("fastq.redirected")
    setup_logging(
        logging.StreamHandler(text), "INFO", Settings({"worker_log_format": "%(levelname)s|%(message)s"}), False
    )
    return StreamToLog(logger, logging.WARNING, original)


def test_each_printed_line_becomes_one_record() -> None:
    text = io.StringIO()
    stream = stream_to(text)
    print("a", 1, file=stream)
    print("b\nc\n\n  \nd", end="", file=stream)
    assert text.getvalue().splitlines() == ["WARNING|a 1", "WARNING|b", "WARNING|c"]
    stream.flush()
    assert text.getvalue().splitlines()[3:] == ["WARNING|d"]


def test_a_line_that_never_ends_is_logged_in_pieces() -> None:
    text = io.StringIO()
    stream = stream_to(text)
    for _ in range(100):
        stream.write("x" * 1000)
    lines = text.getvalue().splitlines()
    assert len(lines) > 5
    assert max(map(len, lines)) < 20_000


def test_a_percent_sign_in_a_print_is_text() -> None:
    text = io.StringIO()
    print("100 %s", file=stream_to(text))
    assert text.getvalue() == "WARNING|100 %s\n"


def test_lines_of_two_threads_are_not_mixed() -> None:
    text = io.StringIO()
    stream = stream_to(text)
    stream.write("main ")
    thread = threading.Thread(target=lambda: print("other", file=stream))
    thread.start()
    thread.join()
    stream.write("thread\n")
    assert text.getvalue().splitlines() == ["WARNING|other", "WARNING|main thread"]


def test_a_log_handler_that_fails_does_not_start_a_circle(monkeypatch: pytest.MonkeyPatch) -> None:
    original = io.StringIO()
    stream = stream_to(io.StringIO(), original)

    class Failing(logging.StreamHandler[io.StringIO]):
        def emit(self, record: logging.LogRecord) -> None:
            print("reporting to standard error", file=stream)

    logging.getLogger().handlers[:] = [Failing()]
    print("one", file=stream)
    assert original.getvalue() == "reporting to standard error\n"


def test_a_sub_process_may_be_given_the_stream() -> None:
    with open(os.devnull, "w", encoding="utf-8") as null:
        stream = StreamToLog(logging.getLogger("x"), logging.WARNING, null)
        assert stream.fileno() == null.fileno()
        assert not stream.isatty()
        subprocess.run([sys.executable, "-c", "print(1)"], stdout=stream, check=True)


CHILD = """
import logging, sys
from fastq.settings import Settings
from fastq.worker.process.log import ChildLogging, open_handler, setup_logging
logfile = sys.argv[1]
handler = open_handler(logfile, "w@h")
setup_logging(handler, "INFO", Settings())
logging.getLogger("fastq.worker").info("parent")
ChildLogging(handler, logfile, "w@h", "WARNING")(3)
logging.getLogger("fastq.app.trace").info("child")
print("printed")
print("to stderr", file=sys.stderr)
"""


def run_child(logfile: str) -> list[tuple[str, ...]]:
    done = subprocess.run([sys.executable, "-c", CHILD, logfile], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return fields_of(io.StringIO(done.stderr))


def test_a_child_has_its_number_in_its_lines_and_its_prints_are_warnings() -> None:
    assert run_child("") == [
        ("INFO", "MainProcess", "parent"),
        ("INFO", "ForkPoolWorker-3", "child"),
        ("WARNING", "ForkPoolWorker-3", "printed"),
        ("WARNING", "ForkPoolWorker-3", "to stderr"),
    ]


def test_a_child_has_a_file_of_its_own_when_the_name_has_its_number(tmp_path: Path) -> None:
    assert run_child(f"{tmp_path}/%n%I.log") == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["w-3.log", "w.log"]
    assert fields_of(io.StringIO((tmp_path / "w.log").read_text())) == [("INFO", "MainProcess", "parent")]
    assert len(fields_of(io.StringIO((tmp_path / "w-3.log").read_text()))) == 3


def test_a_child_that_keeps_its_streams_prints_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(Formatter())
    ChildLogging(handler, redirect_level="")(1)
    print("plain")
    assert capsys.readouterr().out == "plain\n"


# -- the lines about tasks


def task_log() -> tuple[TaskLog, io.StringIO]:
    stream = log_to_text(worker_log_format="%(levelname)s %(message)s")
    return TaskLog(logging.getLogger("fastq.worker")), stream


def test_the_task_lines_are_celery_s_word_for_word() -> None:
    log, stream = task_log()
    log.received("proj.add", "id-1")
    log.succeeded("proj.add", "id-1", 0.25, "3")
    log.failed_expected("proj.add", "id-1", "KeyError('x')")
    log.retry("proj.add", "id-1", retry_reason(3, "ValueError('again')", 2, 3))
    log.ignored("proj.add", "id-1")
    log.rejected("proj.add", "id-1", "no room")
    log.revoked("proj.add", "id-1")
    log.soft_limit("proj.add", "id-1", 1.5)
    log.hard_limit("proj.add", "id-1", 2.0)
    assert stream.getvalue().splitlines() == [
        "INFO Task proj.add[id-1] received",
        "INFO Task proj.add[id-1] succeeded in 0.250000s: 3",
        "INFO Task proj.add[id-1] raised expected: KeyError('x')",
        "INFO Task proj.add[id-1] retry: Retry 2 of 3 in 3s: ValueError('again')",
        "INFO Task proj.add[id-1] ignored",
        "WARNING Task proj.add[id-1] rejected no room",
        "INFO Discarding revoked task: proj.add[id-1]",
        "WARNING Soft time limit (1.5s) exceeded for proj.add[id-1]",
        "ERROR Hard time limit (2.0s) exceeded for proj.add[id-1]",
    ]


def test_a_failure_is_followed_by_its_traceback() -> None:
    log, stream = task_log()
    log.failed("proj.add", "id-1", "KeyError('x')", "Traceback (most recent call last):\n  ...\nKeyError: 'x'\n")
    assert stream.getvalue().splitlines() == [
        "ERROR Task proj.add[id-1] raised unexpected: KeyError('x')",
        "Traceback (most recent call last):",
        "  ...",
        "KeyError: 'x'",
    ]


def test_an_unknown_task_is_named_with_the_remedy_and_cannot_forge_a_line() -> None:
    log, stream = task_log()
    log.unregistered("proj.nope\n[forged]", "id\n[forged]")
    assert stream.getvalue().startswith("ERROR Received unregistered task of type 'proj.nope\\n[forged]'.\n")
    assert "name it with -I" in stream.getvalue()
    assert "\n[forged]" not in stream.getvalue()


def test_a_percent_sign_in_a_value_is_text() -> None:
    log, stream = task_log()
    log.succeeded("proj.add", "id-1", 1.0, "'100 %d'")
    assert stream.getvalue() == "INFO Task proj.add[id-1] succeeded in 1.000000s: '100 %d'\n"


def test_a_long_return_value_is_cut() -> None:
    log, stream = task_log()
    log.succeeded("proj.add", "id-1", 1.0, "x" * 5000)
    assert len(stream.getvalue()) < 1100
    assert stream.getvalue().endswith("xxx...\n")


def test_log_readers_find_the_fields_on_the_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    TaskLog(logging.getLogger("fastq.worker")).received("proj.add", "id-1", "(2, 3)", "{}")
    (record,) = caplog.records
    assert record.args == {"name": "proj.add", "id": "id-1", "args": "(2, 3)", "kwargs": "{}"}
    assert vars(record)["data"] == record.args


def test_the_ready_line_ends_as_people_grep_for_it() -> None:
    assert messages.READY % {"hostname": "fastq@h"} == "fastq@h ready."
    assert messages.WARM_SHUTDOWN == "worker: Warm shutdown (MainProcess)"
