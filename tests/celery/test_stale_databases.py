"""A failure that the main process records in a store whose connection the server has closed meanwhile."""

from __future__ import annotations

from pathlib import Path

import celery
import pytest

from tests.support.servers import Redis, wait_until
from tests.support.stage import empty_database
from tests.support.worker_process import WorkerProcess

APP = "tests.celery.apps.stale"

pytestmark = pytest.mark.redis


def test_stale_connections_are_closed_and_a_failure_is_recorded_at_the_second_attempt(
    redis_server: Redis, tmp_path: Path
) -> None:
    url, file = empty_database(redis_server), tmp_path / "noted"
    env = {"STALE_BROKER": url, "STALE_FILE": str(file), "C_FORCE_ROOT": "1"}
    worker = WorkerProcess(tmp_path, "-c", "1", app=APP, env=env).start()
    try:
        with celery.Celery("client", broker=url, set_as_current=False) as client:
            client.send_task("killed")

        def noted() -> list[str]:
            return file.read_text().split() if file.exists() else []

        def is_recorded() -> bool:
            return noted().count("FAILURE") == 2 and noted()[-1] == "close"

        wait_until(is_recorded, 20.0, lambda: TimeoutError(f"{noted()}\n{worker.log()[-3000:]}"))
        assert noted()[-5:] == ["close", "FAILURE", "close", "FAILURE", "close"]
        assert "could not be recorded" not in worker.log()
    finally:
        worker.kill9()
