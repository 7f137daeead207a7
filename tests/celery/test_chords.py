"""Parts of a chord that die when they have claimed the body and not yet sent it, or do not hear of their claim: the
body runs all the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import celery
import pytest

from tests.celery.conftest import OpenStage
from tests.celery.stage import CeleryStage, Servers, opened
from tests.support.fault_proxy import Direction, FaultProxy

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


class DeafToClaims(FaultProxy):
    """Cuts the connection before the answer that a part has claimed the body, the first time."""

    has_cut = False

    def altered(self, direction: Direction, chunk: bytes) -> bytes:
        """Return the chunk, unless it is that answer: (parts that are ready, of so many besides, of so many, 1)."""
        if direction == "to_client" and not self.has_cut and chunk.startswith(b"*4\r\n") and chunk.endswith(b":1\r\n"):
            self.has_cut = True
            raise ConnectionResetError
        return chunk


@pytest.mark.parametrize("mode", ["--reliable", "--compat"])
def test_the_body_runs_although_the_answer_to_the_claim_was_lost(open_stage: OpenStage, mode: str) -> None:
    stage = open_stage("fastq", "redis", "redis")
    with DeafToClaims("127.0.0.1", stage.servers.redis().port) as proxy:
        stage.start_worker(mode, settings={"result_backend": proxy.url(stage.settings["result_backend"])})
        result = celery.chord([stage.tasks.add.s(1, 2), stage.tasks.add.s(3, 4)], stage.tasks.total.s())()
        assert stage.get(result) == 10
        assert proxy.has_cut
