"""What an operator reads: records by the loggers' names, titles of processes, configuration and report."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import psutil
import pytest

from tests.celery.stage import TIMEOUT_S
from tests.support.servers import Redis, wait_until
from tests.support.stage import empty_database
from tests.support.worker_process import Program, WorkerProcess

APP = "tests.celery.apps.records"


class Site:
    """One worker of the application in ``apps/records.py``, and a client."""

    def __init__(self, folder: Path, url: str, program: Program) -> None:
        self.file = folder / "records.jsonl"
        env = {"RECORDS_FILE": str(self.file), "RECORDS_BROKER": url, "RECORDS_BACKEND": url, "C_FORCE_ROOT": "1"}
        self.logfile = folder / "given.log"
        self.worker = WorkerProcess(
            folder, "-c", "1", "-f", str(self.logfile), app=APP, program=program, await_ready=False, env=env
        ).start()
        self.client = celery.Celery("client", broker=url, backend=url, set_as_current=False)
        self.wait_for(lambda each: each["message"].endswith(" ready."))

    def records(self) -> list[dict[str, Any]]:
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_for(self, is_wanted: Any, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Return the first record of which this holds."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found.extend(filter(is_wanted, self.records()))
            return bool(found)

        wait_until(look, timeout_s, lambda: TimeoutError(f"{self.records()}\n{self.worker.log()[-3000:]}"))
        return found[0]

    def call(self, name: str, *args: Any) -> Any:
        return self.client.send_task(f"{APP}.{name}", args)


@pytest.fixture(scope="module", params=["celery", "fastq"], ids=lambda program: f"under_{program}")
def site(
    request: pytest.FixtureRequest, redis_server: Redis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("records"), empty_database(redis_server), request.param)
    yield site
    site.worker.kill9()
    site.client.close()


def test_a_project_that_configures_celery_s_loggers_sees_the_worker_s_lines(site: Site) -> None:
    connected = site.wait_for(lambda each: each["message"].startswith("Connected to redis://"))
    ready = site.wait_for(lambda each: each["message"].endswith(" ready."))
    assert connected["logger"] == "celery.worker.consumer.connection"
    assert ready["logger"] == "celery.apps.worker"


def test_records_about_tasks_say_what_was_called(site: Site) -> None:
    result = site.call("add", 2, 3)
    assert result.get(timeout=TIMEOUT_S) == 5
    received = site.wait_for(lambda each: each["message"] == f"Task {APP}.add[{result.id}] received")
    assert {key: received["data"][key] for key in ("id", "name", "args", "kwargs")} == {
        "id": result.id,
        "name": f"{APP}.add",
        "args": "(2, 3)",
        "kwargs": "{}",
    }
    succeeded = site.wait_for(lambda each: each["message"].startswith(f"Task {APP}.add[{result.id}] succeeded"))
    assert succeeded["data"].keys() == {"id", "name", "args", "kwargs", "return_value", "runtime"}
    assert (succeeded["data"]["args"], succeeded["data"]["return_value"]) == ("(2, 3)", "5")


def test_ends_by_force_are_told_in_celery_s_words(site: Site) -> None:
    lost = site.call("killed").get(timeout=TIMEOUT_S, propagate=False)
    assert str(lost).startswith("Worker exited prematurely: signal 9 (SIGKILL) Job: ")
    late = site.call("endless").get(timeout=TIMEOUT_S, propagate=False)
    assert (type(late).__name__, late.args) == ("TimeLimitExceeded", (1,))


def test_processes_bear_celery_s_titles(site: Site) -> None:
    node = site.client.control.inspect(timeout=5).ping()
    assert node is not None
    [hostname] = node
    main = psutil.Process(site.worker.pid)

    def titles() -> list[str]:
        return [" ".join(each.cmdline()).strip() for each in [main, *main.children(recursive=True)]]

    wait_until(lambda: titles()[0].startswith("[celeryd:"), TIMEOUT_S, lambda: TimeoutError(str(titles())))
    assert titles()[0].startswith(f"[celeryd: {hostname}:MainProcess] -active- (")
    assert "worker" in titles()[0]
    assert any(each.startswith(f"[celeryd: {hostname}:ForkPoolWorker-") for each in titles()[1:])


def test_the_whole_configuration_is_shown(site: Site) -> None:
    inspect = site.client.control.inspect(timeout=5)
    [changed] = inspect.conf().values()
    assert changed["broker_connection_retry_on_startup"] is True
    assert "enable_utc" not in changed
    [everything] = inspect.conf(with_defaults=True).values()
    assert everything["enable_utc"] is True
    assert {"worker_concurrency", "beat_schedule", "task_routes"} <= everything.keys()


def test_the_report_names_celery_and_its_parts(site: Site) -> None:
    [report] = site.client.control.inspect(timeout=5).report().values()
    assert f"software -> celery:{celery.__version__}" in report["ok"]
    assert "billiard:" in report["ok"]
    assert "loader   -> celery.loaders." in report["ok"]


def test_a_task_revoked_by_a_stamp_is_logged_with_the_stamp(site: Site) -> None:
    site.client.control.revoke_by_stamped_headers({"team": ["blue"]}, reply=True, timeout=5)
    signature = site.client.signature(f"{APP}.add", (1, 1))
    signature.stamp(team="blue")
    result = signature.apply_async()
    site.wait_for(
        lambda each: each["message"].startswith(
            f"Discarding revoked task: {APP}.add[{result.id}] (revoked by header: {{'team'"
        )
    )


def test_a_warm_shutdown_is_printed_where_no_log_is_shown(site: Site) -> None:
    os.kill(site.worker.pid, signal.SIGTERM)
    assert site.worker.wait() == 0
    assert site.worker.log().count("worker: Warm shutdown (MainProcess)") == 1
