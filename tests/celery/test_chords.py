"""A part of a chord that dies when it has claimed the body and not yet sent it: the body runs all the same."""

from __future__ import annotations

import time
from collections.abc import Iterator

import celery
import pytest

from tests.celery.stage import CeleryStage, Servers, opened

APP = "tests.celery.apps.chords"

pytestmark = [pytest.mark.redis, pytest.mark.since("5.7", "no part claims the body")]


@pytest.fixture(scope="module", params=["--reliable", "--compat"])
def stage(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryStage]:
    with opened(servers, tmp_path_factory, "fastq", "redis", "redis") as stage:
        stage.start_worker("-c", "2", request.param, app=APP)
        yield stage


@pytest.mark.parametrize("way", ["die", "hang", "under_another"])
def test_the_body_runs_although_the_part_that_was_to_send_it_is_gone(stage: CeleryStage, way: str) -> None:
    options = {"time_limit": 1.0} if way == "hang" else {}
    header = [stage.client.signature("part", [number], app=stage.client, **options) for number in range(3)]
    began = time.monotonic()
    result = celery.chord(header, app=stage.client)(
        stage.client.signature("body", [str(stage.gate()), way], app=stage.client)
    )
    assert sorted(stage.get(result)) == list(range(3))
    # Celery's claim would stand for 21 s.
    assert time.monotonic() - began < 10
