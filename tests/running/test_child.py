"""What a child does with a call: decode, run, report. The real runner on a real pipe, in this process."""

from __future__ import annotations

import _thread
import json
import os
import pickle
import socket
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from fastq import FastQ
from fastq.errors import Ignore, Reject
from fastq.running.birth import ChildOptions, wait_for_threads
from fastq.running.child import serve as serve_calls
from fastq.running.runner import Runner
from fastq.task import Task
from fastq.wire.message import encode_task
from fastq.wire.pipe import OUTCOME_NAMES, SHARED_SIZE, ChildPipe, RingReader, call_record

OUTCOME = struct.Struct("=IBBHIIq")
MAX_FRAMES = 8  # specified are 15: PERFORMANCE section 3


class Outcome(NamedTuple):
    state: str
    meta: Any
    reason: str


class Bench:
    """Feeds calls to a runner and reads what it reports."""

    def __init__(self) -> None:
        self.app = FastQ("child", broker="memory://child")
        self._ours, self._theirs = socket.socketpair()
        self._shared = os.memfd_create("test")
        os.ftruncate(self._shared, SHARED_SIZE)
        self._ring = RingReader(self._shared)
        self._seq = 0

    def run(
        self,
        *records: bytes,
        options: ChildOptions | None = None,
        around: Callable[[Callable[[], None]], None] | None = None,
    ) -> list[Outcome]:
        """Run the calls and return their outcomes."""
        self._ours.sendall(b"".join(records))
        self._ours.shutdown(socket.SHUT_WR)
        self.app.finalize()
        runner = Runner(self.app, options or ChildOptions("node"))
        pipe = ChildPipe(self._theirs.fileno(), self._shared)
        (around or (lambda serve: serve()))(lambda: serve_calls(pipe, runner))
        found = []
        while (data := self._ring.take()) is not None:
            _size, kind, state, _, _, meta_size, _ = OUTCOME.unpack_from(data)
            if kind == 3:
                meta = json.loads(data[OUTCOME.size : OUTCOME.size + meta_size]) if meta_size else None
                found.append(Outcome(OUTCOME_NAMES[state], meta, data[OUTCOME.size + meta_size :].decode()))
        return found

    def call(
        self,
        task: str,
        *args: Any,
        body: bytes | None = None,
        wants_result: bool = True,
        soft: float = 0,
        **options: Any,
    ) -> bytes:
        """Return the record of one call."""
        self._seq += 1
        body = json.dumps([args, {}, {}]).encode() if body is None else body
        message = encode_task(task, f"id-{self._seq}", body, **options)
        return call_record(
            self._seq, "", "celery", message.props, message.body, wants_result=wants_result, soft_time_limit=soft
        )

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()
        os.close(self._shared)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_a_stored_no_op_takes_at_most_eight_python_frames(bench: Bench) -> None:
    @bench.app.task(name="noop")
    def noop(number: int) -> int:
        return number

    calls = 200
    frames = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal frames
        if event == "call":
            frames += 1

    def around(serve: Callable[[], None]) -> None:
        sys.setprofile(profile)
        try:
            serve()
        finally:
            sys.setprofile(None)

    outcomes = bench.run(*[bench.call("noop", number) for number in range(calls)], around=around)
    assert [outcome.meta["result"] for outcome in outcomes] == list(range(calls))
    per_call = frames / calls
    print(f"{per_call:.1f} Python frames per call")
    assert int(per_call) <= MAX_FRAMES  # the rest is what begins and ends the loop


def test_a_value_is_stored_in_celerys_layout(bench: Bench) -> None:
    bench.app.task(name="add")(lambda x, y: x + y)
    [outcome] = bench.run(bench.call("add", 2, 3))
    assert outcome.state == "SUCCESS"
    assert list(outcome.meta) == ["status", "result", "traceback", "children", "date_done", "task_id"]
    assert (outcome.meta["status"], outcome.meta["result"], outcome.meta["task_id"]) == ("SUCCESS", 5, "id-1")


def test_an_exception_is_stored_with_its_class_arguments_and_traceback(bench: Bench) -> None:
    @bench.app.task(name="fail")
    def fail() -> None:
        raise ValueError("no", 7)

    [outcome] = bench.run(bench.call("fail"))
    assert outcome.state == "FAILURE"
    assert outcome.meta["result"] == {"exc_type": "ValueError", "exc_message": ["no", 7], "exc_module": "builtins"}
    assert "in fail" in outcome.meta["traceback"]
    assert "fastq/running" not in outcome.meta["traceback"]


def test_a_value_without_a_json_form_is_the_tasks_failure(bench: Bench) -> None:
    bench.app.task(name="odd")(lambda: object())
    bench.app.task(name="nan")(lambda: {"v": [float("nan")]})
    outcomes = bench.run(bench.call("odd"), bench.call("nan"))
    assert [(each.state, each.meta["result"]["exc_type"]) for each in outcomes] == [("FAILURE", "EncodeError")] * 2
    assert "value['v'][0] is nan" in outcomes[1].meta["result"]["exc_message"][0]


def test_whatever_pythons_json_reads_reaches_the_task(bench: Bench) -> None:
    bench.app.task(name="show")(repr)
    [outcome] = bench.run(bench.call("show", body=rb'[[[NaN, 1e400, "caf\udce9"]], {}, {}]'))
    assert outcome.meta["result"] == r"[nan, inf, 'caf\udce9']"


def test_even_a_system_exit_is_only_the_calls_end(bench: Bench) -> None:
    bench.app.task(name="leave")(lambda: sys.exit(3))
    bench.app.task(name="after")(lambda: 1)
    first, second = bench.run(bench.call("leave"), bench.call("after"))
    assert (first.state, first.meta["result"]["exc_type"], second.state) == ("FAILURE", "SystemExit", "SUCCESS")


@pytest.mark.parametrize(
    ("error", "state"), [(Ignore(), "IGNORED"), (Reject("bad"), "REJECTED"), (Reject("later", requeue=True), "REQUEUE")]
)
def test_control_flow_becomes_its_outcome(bench: Bench, error: Exception, state: str) -> None:
    def steer() -> None:
        raise error

    bench.app.task(name="steer")(steer)
    [outcome] = bench.run(bench.call("steer"))
    assert outcome.state == state


def test_limits_written_as_text_are_numbers_in_the_request(bench: Bench) -> None:
    seen: list[Any] = []
    bench.app.task(name="t", bind=True)(lambda self: seen.extend(self.request.timelimit))
    [outcome] = bench.run(bench.call("t", headers={"timelimit": ["5", None]}))
    assert (outcome.state, seen) == ("SUCCESS", [5.0, None])


@pytest.mark.parametrize(
    ("body", "options", "reason"),
    [
        (b"", {}, "empty-body"),
        (b"{", {}, "json"),
        (b"null", {}, "body-shape"),
        (b"3", {}, "body-shape"),
        (b"[[]]", {}, "body-shape"),
        (b'["ab",{},{}]', {}, "args"),
        (b"[[],[],{}]", {}, "kwargs"),
        (b"[[],{},7]", {}, "embed"),
        (b"\xff\xfe", {}, "json"),
        (b"[" * 100_000, {}, "json"),
        (b"[[" + b"7" * 6000 + b"],{},{}]", {}, "json"),
        (b"[[Nan],{},{}]", {}, "json"),
        (b"x", {"content_type": "application/x-unheard-of"}, "content-type"),
        (
            pickle.dumps(((), {}, {})),
            {"content_type": "application/x-python-serialize", "content_encoding": "binary"},
            "content-type",
        ),
        (b"[[],{},{}]", {"content_encoding": "martian"}, "content-encoding"),
        (b"[[],{},{}]", {"compression": "application/x-unheard-of"}, "compression"),
        (b"not zlib", {"compression": "application/x-gzip"}, "compression"),
        (zlib.compress(b"[" + b" " * (1 << 27)), {"compression": "application/x-gzip"}, "compression"),
    ],
)
def test_a_body_that_is_no_tasks_is_refused_under_its_class(
    bench: Bench, body: bytes, options: dict[str, Any], reason: str
) -> None:
    ran = []
    bench.app.task(name="t")(lambda *args: ran.append(args))
    [outcome] = bench.run(bench.call("t", body=body, **options))
    # Behind the class comes what the decoder said, for the sender.
    assert (outcome.state, outcome.reason.partition("\n")[0], outcome.meta) == ("MALFORMED", reason, None)
    assert not ran


def test_a_compressed_body_and_null_kwargs_and_embed_run(bench: Bench) -> None:
    bench.app.task(name="t")(lambda *args: list(args))
    compressed = bench.call("t", body=zlib.compress(b"[[1],{},{}]"), compression="application/x-gzip")
    first, second = bench.run(compressed, bench.call("t", body=b"[[2],null,null]"))
    assert (first.meta["result"], second.meta["result"]) == ([1], [2])


def test_handlers_run_in_their_order_and_cannot_change_the_outcome(bench: Bench) -> None:
    events: list[tuple[Any, ...]] = []

    class Watched(Task[..., Any]):
        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            events.append(("before", task_id, list(args)))

        def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
            events.append(("success", retval))
            raise RuntimeError("in a handler")

        def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            events.append(("failure", repr(exc), "Traceback" in str(einfo)))

        def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            events.append(("after", status))

    bench.app.task(name="half", base=Watched)(lambda x: 1 // x)
    good, bad = bench.run(bench.call("half", 1), bench.call("half", 0))
    assert (good.state, bad.state) == ("SUCCESS", "FAILURE")
    assert events == [
        ("before", "id-1", [1]),
        ("success", 1),
        ("after", "SUCCESS"),
        ("before", "id-2", [0]),
        ("failure", repr(ZeroDivisionError("integer division or modulo by zero")), True),
        ("after", "FAILURE"),
    ]


def test_the_soft_limit_interrupts_the_task_and_only_it(bench: Bench) -> None:
    import time

    bench.app.task(name="sleep")(time.sleep)
    bench.app.task(name="catch")(_catch_soft_limit)
    first, second, third = bench.run(
        bench.call("sleep", 5, soft=0.05), bench.call("catch", soft=0.05), bench.call("sleep", 0, soft=1)
    )
    assert first.meta["result"]["exc_type"] == "SoftTimeLimitExceeded"
    assert second.meta["result"] == "caught"
    assert third.state == "SUCCESS"


def _catch_soft_limit() -> str:
    import time

    from fastq.errors import SoftTimeLimitExceeded

    try:
        time.sleep(5)
    except SoftTimeLimitExceeded:
        return "caught"
    return "not interrupted"


def test_a_thread_that_python_has_not_started_is_not_waited_for() -> None:
    known, end = threading.Event(), threading.Event()

    def attach() -> None:
        threading.current_thread()  # as when a library's own thread calls Python
        known.set()
        end.wait(10)

    _thread.start_new_thread(attach, ())
    assert known.wait(10)
    try:
        wait_for_threads()
    finally:
        end.set()
