"""celery-batches: its Strategy gathers messages in the worker's parent and gives the pool one call for many."""

from __future__ import annotations

import pytest

from tests.celery.tools.tool import Tool

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]


def test_calls_run_together_when_there_are_enough_or_it_is_time(tool: Tool) -> None:
    worker = tool.worker("batches")
    full = [[3, 0], [3, 1], [3, 2]]
    rest = [[2, 3], [2, 4], [1, 5]]
    assert tool.client("batches") == [*full, *rest, "at once"]
    assert worker.stop() == 0
