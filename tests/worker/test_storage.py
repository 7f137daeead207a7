"""Workers whose result store is away: at start, later, or refusing the login. Tasks run on, and results are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fastq import FastQ
from fastq.brokers.redis.blocking import BlockingRedis
from fastq.brokers.redis.url import parse_redis_url
from fastq.settings import Settings
from fastq.wire.ids import new_id
from fastq.wire.message import encode_task
from tests.conftest import OwnRedis
from tests.support.stage import Stage, open_stage, until

pytestmark = [pytest.mark.redis, pytest.mark.rabbitmq]

WANTED = 30  # more than two children may hold


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    opened = open_stage(request.param, request, tmp_path)
    yield opened
    opened.close()


def send_wanted(stage: Stage, count: int = WANTED) -> dict[str, int]:
    """Send calls whose results are wanted, and return their numbers by id."""
    numbers = {new_id(): len(stage.sent) + i for i in range(count)}
    stage.publish(
        [encode_task("work", task_id, f"[[{number}],{{}},{{}}]".encode()) for task_id, number in numbers.items()]
    )
    stage.sent += numbers.values()
    return numbers


def values(client: FastQ, numbers: dict[str, int]) -> dict[str, Any]:
    return {task_id: client.AsyncResult(task_id).get(timeout=15) for task_id in numbers}


@pytest.mark.parametrize("stage", ["amqp", "redis", "sqlite"], indirect=True)
def test_tasks_run_on_while_the_store_is_away_and_results_are_kept(stage: Stage, own_redis: OwnRedis) -> None:
    store = own_redis()
    worker = stage.start_worker("-c", "2", "--prefetch-multiplier", "2", result_backend=store.url())
    wanted = send_wanted(stage)
    stage.wait_for(stage.send(20), 10)
    until(lambda: stage.depth() == WANTED, 5, "all but what waits for its result is settled")
    assert worker.log().count(f"Results cannot be stored at {store.url()}: ") == 1
    store.start()
    with closing(FastQ("other", broker=stage.url, backend=store.url())) as client:
        assert values(client, wanted) == wanted
    stage.wait_for_settled()
    store.kill9()
    worker.wait_for_log("Results cannot be stored at", count=2)
    wanted = send_wanted(stage)
    stage.wait_for(stage.send(20), 10)
    store.start()
    with closing(FastQ("other", broker=stage.url, backend=store.url())) as client:
        assert values(client, wanted) == wanted
    stage.wait_for_settled()
    assert set(stage.ledger.started().values()) == {1}
    assert worker.log().count(" ready.") == 1
    store.kill9()
    wanted = send_wanted(stage, 1)
    stage.wait_for(wanted.values(), 10)
    assert worker.stop(15) == 0
    assert "1 tasks have run, but their results could not be stored" in worker.log()
    # As after a crash: it runs again rather than that its result is lost.
    assert stage.depth() == 1


@pytest.mark.parametrize("store", ["sqlite:///{}/results.db", "tests.toys.folder_store:STORE://{}"])
@pytest.mark.parametrize("stage", ["redis"], indirect=True)
def test_results_wait_for_a_folder_that_is_not_there(stage: Stage, tmp_path: Path, store: str) -> None:
    folder = tmp_path / "mounted"
    url = store.format(folder)
    worker = stage.start_worker("-c", "2", result_backend=url)
    wanted = send_wanted(stage)
    stage.wait_for(stage.send(20), 10)
    assert "Results cannot be stored at" in worker.log()
    folder.mkdir()
    worker.wait_for_log("results can be stored at .* again")
    with closing(FastQ("other", broker=stage.url, backend=url)) as client:
        assert values(client, wanted) == wanted


@pytest.mark.parametrize("stage", ["redis"], indirect=True)
def test_a_store_that_refuses_the_login_is_tried_again(stage: Stage, own_redis: OwnRedis) -> None:
    store = own_redis("right")
    store.start()
    url = store.url().replace("redis://", "redis://:{}@")
    worker = stage.start_worker("-c", "2", result_backend=url.format("wrong"))
    wanted = send_wanted(stage)
    stage.wait_for(stage.send(20), 10)
    assert "wrong" not in worker.wait_for_log("Results cannot be stored at (.*)")[0]
    with closing(BlockingRedis(parse_redis_url(url.format("right"), Settings({})), 5.0)) as redis:
        redis.call("CONFIG", "SET", "requirepass", "wrong")
    with closing(FastQ("other", broker=stage.url, backend=url.format("wrong"))) as client:
        assert values(client, wanted) == wanted
