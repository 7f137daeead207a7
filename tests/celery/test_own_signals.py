"""Handlers that the application sets in the main process stay its own, as under Celery."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests.celery.conftest import stages
from tests.celery.stage import TIMEOUT_S
from tests.support.servers import wait_until

APP = "tests.celery.apps.own_signals"


@pytest.mark.parametrize("kind", stages(("redis", "redis")))
@pytest.mark.parametrize("what", ["is alone", "calls the old one"])
@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_handlers_of_the_application_stay_its_own(open_stage: Any, kind: Any, what: str, pool: str) -> None:
    stage = open_stage(*kind)
    worker = stage.start_worker("-c", "1", "-P", pool, app=APP, env={"OWN_SIGNALS": what})
    assert "signal only works in main thread" not in worker.log()
    for count, number in enumerate((signal.SIGUSR2, signal.SIGWINCH, signal.SIGTERM), 1):
        worker.signal(number)
        assert stage.wait_for_notes("signal", count)[-1]["number"] == number
    if what == "is alone":
        assert worker.exit_code is None
        assert "Warm shutdown" not in worker.log()
        worker.signal(signal.SIGINT)
    wait_until(lambda: worker.exit_code is not None, TIMEOUT_S, lambda: AssertionError(worker.log()))
    assert worker.exit_code == 0
    assert "Warm shutdown" in worker.log()
