"""celery-aio-pool, a pool written for Celery, which calls tasks that are coroutine functions by a tracer of its own."""

from __future__ import annotations

import pytest

from tests.celery.tools.tool import Tool

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]


def test_coroutine_functions_and_others_run_in_it(tool: Tool) -> None:
    tool.environment["CELERY_CUSTOM_WORKER_POOL"] = "celery_aio_pool.pool:AsyncIOPool"
    worker = tool.worker("aio_pool", "-P", "custom")
    assert tool.client("aio_pool") == [True, True, 6, ["FAILURE", "ValueError('no')"]]
    assert worker.stop() == 0
