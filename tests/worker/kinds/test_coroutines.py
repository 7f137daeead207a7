"""Coroutine functions as tasks: the loop they run on, libraries that look at it, and what can go wrong on it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.support.kinds import CALLS, PATIENCE_S, Field, rows
from tests.support.servers import PostgreSQL
from tests.support.stage import until

async_rows = rows(lambda row: row.kind.has_loop)


@async_rows
def test_the_loop_is_uvloop(shared: Field) -> None:
    assert shared.stage.call("loop_is").get(timeout=PATIENCE_S) == "uvloop"


@async_rows
def test_timeouts_of_asyncio_end_what_they_surround(shared: Field) -> None:
    assert shared.stage.call("times_out").get(timeout=PATIENCE_S) == "timed out"


@async_rows
def test_timeouts_work_under_a_soft_limit(shared: Field) -> None:
    result = shared.stage.call("times_out", soft_time_limit=20)
    assert result.get(timeout=PATIENCE_S) == "timed out"


@async_rows
def test_parts_of_a_call_belong_to_it(shared: Field) -> None:
    results = [shared.stage.call("groups") for _ in range(CALLS)]
    for result in results:
        assert result.get(timeout=PATIENCE_S) == [result.id, result.id]


@async_rows
def test_a_soft_limit_ends_the_parts_of_a_call_too(shared: Field) -> None:
    result = shared.stage.call("groups", 60, soft_time_limit=0.5)
    ended = result.get(timeout=PATIENCE_S, propagate=False)
    assert type(ended).__name__ == "SoftTimeLimitExceeded", repr(ended)


@async_rows
def test_a_hard_limit_ends_the_parts_of_a_call_too(shared: Field) -> None:
    assert shared.error_of(shared.stage.call("groups", 60, time_limit=0.5)) == "TimeLimitExceeded"
    assert shared.call("work").get(timeout=PATIENCE_S) == shared.stage.sent[-1]


@async_rows
def test_a_part_that_fails_fails_its_call(shared: Field) -> None:
    result = shared.stage.call("group_fails")
    assert shared.error_of(result) == "ValueError"
    assert result.state == "FAILURE"


@async_rows
def test_anyio_works(shared: Field) -> None:
    result = shared.stage.call("anyio_scopes")
    seen = result.get(timeout=PATIENCE_S)
    assert (sorted(seen[:2]), seen[2:]) == (["first", "second"], ["moved on", result.id])


class Pages(BaseHTTPRequestHandler):
    """Pages with their names; one never comes."""

    protocol_version = "HTTP/1.1"
    is_over = threading.Event()

    def do_GET(self) -> None:
        """Answer."""
        if self.path == "/late":
            self.is_over.wait(PATIENCE_S)
            self.close_connection = True
            return
        page = f"page {self.path}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """The address of a web server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        Pages.is_over.set()
        server.shutdown()
        thread.join()


@async_rows
@pytest.mark.parametrize("library", ["httpx", "aiohttp"])
def test_libraries_for_http_work(shared: Field, web: str, library: str) -> None:
    results = [shared.stage.call(f"fetches_by_{library}", web) for _ in range(CALLS)]
    for result in results:
        assert result.get(timeout=PATIENCE_S) == [result.id, "page /0", "page /1", "page /2"]


@async_rows
def test_asyncpg_works(shared: Field, postgresql: PostgreSQL) -> None:
    results = [shared.stage.call("queries_by_asyncpg", postgresql.url) for _ in range(CALLS)]
    for result in results:
        assert result.get(timeout=PATIENCE_S) == [result.id, 1, 2, 3, 4, 7]


@async_rows
def test_sqlalchemy_works(shared: Field, postgresql: PostgreSQL) -> None:
    results = [shared.stage.call("queries_by_sqlalchemy", postgresql.url) for _ in range(CALLS)]
    for result in results:
        assert result.get(timeout=PATIENCE_S) == [result.id, 4, 0, 1, 2, 3]


@async_rows
def test_a_task_can_await_another_one(shared: Field) -> None:
    result = shared.stage.call("calls_another")
    value, is_same, name = result.get(timeout=PATIENCE_S)
    assert len(value) == 2
    assert is_same
    assert name == "calls_another"


@async_rows
def test_a_task_that_cancels_itself_has_failed(shared: Field) -> None:
    gate = shared.gate()
    other = shared.call("until", str(gate))
    number = shared.stage.sent[-1]
    shared.wait_for_running([number])
    for how in ("raise", "cancel"):
        result = shared.stage.call("cancels_itself", how)
        assert shared.error_of(result) == "CancelledError", how
        assert result.state == "FAILURE"
    gate.touch()
    assert other.get(timeout=PATIENCE_S) == number


@async_rows
def test_what_a_task_leaves_running_harms_nobody(shared: Field) -> None:
    assert shared.stage.call("leaves_a_task").get(timeout=PATIENCE_S) == shared.stage.sent[-1]
    results = shared.call_many(CALLS, "work", 0.05)
    assert [result.get(timeout=PATIENCE_S) for result in results] == shared.last(CALLS)
    assert shared.stage.workers[0].exit_code is None


@rows(lambda row: row.kind.name == "loop")
def test_neither_a_loop_that_stands_still_nor_plain_functions_stop_the_other(field: Field) -> None:
    worker = field.start()
    stuck = field.call("stuck", 4)
    field.wait_for_running([0])
    assert field.stage.call("plain_beside", 0.1).get(timeout=PATIENCE_S)[0] != ""
    assert 0 in field.ledger.running(), "the loop has gone on before the plain function had ended"
    assert stuck.get(timeout=PATIENCE_S) == 0
    busy = field.stage.call("spins", 4)
    field.wait_for_running([2])
    assert field.call("work", 0.1).get(timeout=PATIENCE_S) == 3
    assert 2 in field.ledger.running(), "the plain function had ended before the coroutine"
    assert busy.get(timeout=PATIENCE_S)[0] == busy.id
    assert worker.exit_code is None


@async_rows
def test_a_loop_that_does_not_turn_is_told_of(field: Field) -> None:
    worker = field.start()
    result = field.call("stuck", 2.5)
    worker.wait_for_log(r"(?s)the event loop of pid:\d+ has taken no turn for [\d.]+ s.*in stuck", PATIENCE_S)
    assert result.get(timeout=PATIENCE_S) == 0
    assert field.ask("stats")["pool"]["stalls"] == 1


@async_rows
def test_a_loop_that_never_turns_is_replaced(field: Field) -> None:
    """Its other calls run again, and are no part of what it died of."""
    worker = field.start_reliable(fastq_loop_stall_s=2, fastq_max_child_deaths=2)
    others = field.call_many(CALLS - 1, "work", 1)
    numbers = field.last(CALLS - 1)
    field.wait_for_running(numbers)
    stuck = field.call("stuck", 600)
    assert field.error_of(stuck) == "WorkerLostError"
    assert [result.get(timeout=PATIENCE_S) for result in others] == numbers
    assert worker.exit_code is None


@async_rows
def test_a_task_that_exits_ends_no_other(field: Field) -> None:
    worker = field.start_reliable()
    gate = field.gate()
    other = field.call("until", str(gate))
    field.wait_for_running([0])
    exits = field.stage.call("exits")
    assert field.error_of(exits) != ""
    gate.touch()
    assert other.get(timeout=PATIENCE_S) == 0
    assert worker.exit_code is None


@async_rows
def test_plain_functions_do_not_stop_the_loop(field: Field) -> None:
    """They run in threads beside it, or in children of their own."""
    field.start(calls=2)
    plain = field.stage.call("plain_beside", 2)
    until(lambda: 0 in field.ledger.running(), PATIENCE_S, "the plain function runs")
    assert field.call("work", 0.1).get(timeout=PATIENCE_S) == 1
    assert 0 in field.ledger.running()
    assert plain.get(timeout=PATIENCE_S) == [plain.id, "plain_beside"]
    if sys.version_info >= (3, 11):
        assert "took no turn" not in field.stage.workers[0].log()


@pytest.mark.parametrize("task", ["handled", "handled_traced"])
@pytest.mark.parametrize("suffix", ["_async", ""])
def test_handlers_that_are_coroutine_functions_are_awaited(shared: Field, task: str, suffix: str) -> None:
    """On the loop of their task, where that has one; on the way through Celery's tracer, too."""
    if task == "handled_traced" and shared.row.program != "celery":
        return
    worker = shared.stage.workers[0]
    # FastQ's are called at each end, Celery's ``after_return`` not at a retry.
    at_retry = " after_return RETRY" if shared.row.program == "fastq" else ""
    ends = {
        "succeeds": ("before_start", "on_success {}", "after_return SUCCESS"),
        "fails": ("before_start", "on_failure number {} is bad", "after_return FAILURE"),
        "retries": ("before_start", "on_retry number {} again", at_retry, "before_start", "on_success {}"),
    }
    for end, told in ends.items():
        result = shared.stage.call(f"{task}{suffix}", end)
        assert shared.error_of(result) == ("ValueError" if end == "fails" else "")
        number = shared.stage.sent[-1]
        loop = "uvloop" if suffix and shared.kind.has_loop else ""
        lines = [rf"{each.strip().format(number)} of {result.id} on {loop}" for each in told if each]
        worker.wait_for_log("(?s)" + ".*".join(lines), PATIENCE_S)
    assert "never awaited" not in worker.log()
