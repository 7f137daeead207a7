"""Marking revoked tasks in a result store, beside the loop."""

from __future__ import annotations

import pytest

from fastq.codecs.meta import encode_meta
from fastq.results import open_store
from fastq.settings import Settings
from fastq.worker.remote.marks import RevocationMarks
from tests.support.servers import Redis, wait_until


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def store_url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        url: str = request.getfixturevalue("sqlite_url")
        return url
    server: Redis = request.getfixturevalue("redis_server")
    return server.url(14)


def test_what_nobody_has_begun_becomes_revoked(store_url: str) -> None:
    settings = Settings({"broker_url": store_url, "result_backend": store_url})
    store = open_store(store_url, settings)
    for task_id, state in (("m-done", "SUCCESS"), ("m-runs", "STARTED"), ("m-again", "RETRY")):
        store.save(task_id, state, encode_meta(task_id, state, None))
    marks = RevocationMarks(store_url, settings)
    marks.mark(["m-done", "m-runs", "m-again", "m-new"])

    def state(task_id: str) -> str | None:
        meta = store.load(task_id)
        return None if meta is None else meta["status"]

    wait_until(lambda: state("m-new") == "REVOKED", 20, lambda: AssertionError(state("m-new")))
    assert [state(each) for each in ("m-done", "m-runs", "m-again")] == ["SUCCESS", "STARTED", "REVOKED"]
    marks.close()
    store.close()


@pytest.mark.parametrize("backend", ["rpc://", "disabled"])
def test_without_a_store_nothing_happens(backend: str) -> None:
    marks = RevocationMarks(backend, Settings())
    marks.mark(["x"])
    assert marks._thread is None
    marks.close()


def test_a_store_that_cannot_be_used_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    marks = RevocationMarks("nosuch://", Settings())
    marks.mark(["x"])
    wait_until(lambda: "cannot be marked" in caplog.text, 10, lambda: AssertionError(caplog.text))
    marks.close()
