"""A result store that is not there, goes away or refuses the login: tasks that ignore their results do not notice."""

from __future__ import annotations

from typing import Any

import pytest
from redis import Redis as RedisClient

from tests.celery.conftest import OpenStage, stages
from tests.conftest import OwnRedis


@pytest.mark.parametrize("fault", ["closed", "lost later", "refuses"])
@pytest.mark.parametrize("kind", stages(("amqp", "disabled"), ("redis", "disabled")))
def test_tasks_that_ignore_their_results_run_without_the_store(
    kind: Any, fault: str, open_stage: OpenStage, own_redis: OwnRedis
) -> None:
    stage = open_stage(*kind)
    store = own_redis("right")
    if fault != "closed":
        store.start()
    url = store.url().replace("redis://", "redis://:{}@")
    password = "wrong" if fault == "refuses" else "right"
    stage.start_worker(settings={"result_backend": url.format(password)})
    if fault == "lost later":
        stored = stage.tasks.sleep_for.delay(0)
        with RedisClient(port=store.port, password="right") as redis:
            stage.until(lambda: redis.exists(f"celery-task-meta-{stored.id}") == 1, "a result")
        store.kill9()
    if stage.runner == "fastq":
        # Celery's children wait for the store, and lose the result.
        wanted = [stage.tasks.sleep_for.delay(0) for _ in range(5)]
    for number in range(10):
        stage.tasks.ignored.delay(number)
    stage.wait_for_notes("ran", 10)
    if stage.runner == "celery":
        return
    for each in wanted:
        stage.wait_for_notes("holding", id=each.id)
    stage.wait_for_empty()  # acknowledged early, as Celery does
    if fault != "refuses":
        store.start()
    with RedisClient(port=store.port, password="right") as redis:
        redis.config_set("requirepass", password)
        stage.until(lambda: redis.exists(*(f"celery-task-meta-{each.id}" for each in wanted)) == 5, "5 results")
    assert stage.worker.log().count(" ready.") == 1
