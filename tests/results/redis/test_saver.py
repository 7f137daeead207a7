"""A worker's results into Redis: what is written, what is confirmed, and when the server refuses or goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastq.brokers.redis.blocking import BlockingRedis
from fastq.brokers.redis.url import RedisUrl
from fastq.codecs.meta import encode_meta
from fastq.codecs.payload import PayloadCodec
from fastq.errors import ConnectionLost, SettingsError
from fastq.results import open_saver
from fastq.results.redis import saver as redis_store
from fastq.results.redis.saver import RedisSaver
from fastq.results.redis.store import RedisStore
from fastq.settings import Settings
from fastq.wire.ids import new_id
from tests.support.conformance.savers import TIMEOUT_S, SaverConformance, Saving, item
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import Redis, free_ports

pytestmark = pytest.mark.redis

DATABASE = 6


def settings_with(**values: Any) -> Settings:
    settings = Settings(values)
    settings.freeze()
    return settings


@pytest.fixture
def url(redis_server: Redis) -> str:
    return redis_server.url(DATABASE)


@pytest.fixture
def open_saving(url: str) -> Iterator[Callable[..., Saving]]:
    """A function that opens a saver with settings of the test's choice."""
    opened: list[Saving] = []

    def open_saving(where: str = url, **values: Any) -> Saving:
        opened.append(Saving(where, settings_with(**values)))
        return opened[-1]

    yield open_saving
    for saving in opened:
        saving.close()


@pytest.fixture
def store(url: str) -> Iterator[RedisStore]:
    store = RedisStore(url, settings_with(result_accept_content=["json"]))
    yield store
    store.close()


@pytest.fixture
def raw(redis_server: Redis) -> Iterator[BlockingRedis]:
    client = BlockingRedis([RedisUrl("127.0.0.1", redis_server.port, DATABASE)], TIMEOUT_S)
    yield client
    client.close()


OpenSaving = Callable[..., Saving]


class TestSaver(SaverConformance):
    @pytest.fixture
    def settings(self) -> Settings:
        return settings_with()

    @pytest.fixture
    def proxy(self, redis_server: Redis, fault_proxy: Callable[[str, int], FaultProxy]) -> FaultProxy:
        return fault_proxy("127.0.0.1", redis_server.port)

    @pytest.fixture
    def url(self, proxy: FaultProxy) -> str:
        return f"redis://127.0.0.1:{proxy.port}/{DATABASE}"

    @pytest.fixture
    def lose(self, proxy: FaultProxy) -> Callable[[], Callable[[], None]]:
        def lose() -> Callable[[], None]:
            proxy.refuse()
            proxy.cut()
            return lambda: proxy.refuse(False)

        return lose


def test_results_are_stored_and_their_tokens_confirmed(open_saving: OpenSaving, store: RedisStore) -> None:
    saving = open_saving()
    states = ["SUCCESS", "FAILURE", "STARTED", "SUCCESS", "REVOKED"]
    batch = [item(state, number, token=number) for number, state in enumerate(states)]
    saving.save(*batch)
    saving.until(lambda: len(saving.stored) == 4)  # token 0 is none
    assert saving.stored == [1, 2, 3, 4]
    metas = [store.load(task_id) for task_id, *_ in batch]
    assert [(meta["status"], meta["result"]) for meta in metas if meta] == [(s, n) for n, s in enumerate(states)]


def test_keys_lifetimes_and_announcements_are_celerys(open_saving: OpenSaving, raw: BlockingRedis) -> None:
    saving = open_saving(
        result_expires=60, result_failure_expires=0, result_backend_transport_options={"global_keyprefix": "p"}
    )
    good, bad = item(), item("FAILURE")
    keys = [f"p_celery-task-meta-{each[0]}".encode() for each in (good, bad)]
    listener = BlockingRedis([raw.url], TIMEOUT_S)
    listener.subscribe(*keys)
    heard = [listener.read_push(time.monotonic() + TIMEOUT_S) for _ in keys]
    saving.save(good, bad)
    heard = [listener.read_push(time.monotonic() + TIMEOUT_S) for _ in keys]
    assert heard == [[b"message", keys[0], good[2]], [b"message", keys[1], bad[2]]]
    assert raw.pipeline([("TTL", key) for key in keys]) == [60, -1]
    listener.close()


def test_a_success_is_not_replaced_by_what_comes_late(open_saving: OpenSaving, store: RedisStore) -> None:
    saving, first = open_saving(), item(result=1)
    late = [item(state, 2, token, first[0]) for token, state in enumerate(("STARTED", "RETRY", "FAILURE"), 1)]
    saving.save(first)
    saving.save(*late)
    saving.until(lambda: saving.stored == [1, 2, 3])
    assert store.wait(first[0], TIMEOUT_S)["result"] == 1


def test_states_before_the_end_are_replaced(open_saving: OpenSaving, store: RedisStore) -> None:
    saving, first = open_saving(), item("STARTED")
    saving.save(first, item("FAILURE", token=1, task_id=first[0]))
    saving.until(lambda: saving.stored == [1])
    assert store.wait(first[0], TIMEOUT_S)["status"] == "FAILURE"


def test_compressed_results_are_kept_and_replaced_alike(open_saving: OpenSaving, store: RedisStore) -> None:
    saving = open_saving(result_compression="gzip")
    done, started = item(result="x" * 1000), item("STARTED")
    saving.save(done, started)
    saving.save(item("FAILURE", token=1, task_id=done[0]), item("FAILURE", token=2, task_id=started[0]), item(token=3))
    saving.until(lambda: sorted(saving.stored) == [1, 2, 3])
    assert store.wait(done[0], TIMEOUT_S)["result"] == "x" * 1000
    assert store.wait(started[0], TIMEOUT_S)["status"] == "FAILURE"


def test_what_was_handed_over_is_stored_before_the_connection_closes(
    open_saving: OpenSaving, store: RedisStore
) -> None:
    saving, batch = open_saving(), [item(result="x" * 100_000) for _ in range(50)]
    saving.save(*batch)
    saving.close()
    assert all(store.load(task_id) for task_id, *_ in batch)


def test_a_server_short_of_memory_is_asked_again_for_what_is_final(
    open_saving: OpenSaving,
    store: RedisStore,
    raw: BlockingRedis,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redis_store, "RETRY_S", 0.05)
    saving, started, done, failed = open_saving(), item("STARTED", token=1), item(token=2), item("FAILURE", token=3)
    raw.call("CONFIG", "SET", "maxmemory", 1)
    try:
        saving.save(started, done, failed)
        saving.until(lambda: saving.stored == [1])
        saving.run(asyncio.sleep(0.2))
        assert saving.stored == [1], "what is not stored is not confirmed"
    finally:
        raw.call("CONFIG", "SET", "maxmemory", 0)
    saving.until(lambda: saving.stored == [1, 2, 3])
    assert (store.wait(done[0], TIMEOUT_S)["status"], store.load(started[0])) == ("SUCCESS", None)
    assert caplog.text.count("Redis takes no results: OOM") == 1
    assert saving.refused == []


def test_a_result_that_can_never_be_stored_does_not_hold_up_others(
    open_saving: OpenSaving, store: RedisStore, raw: BlockingRedis, caplog: pytest.LogCaptureFixture
) -> None:
    saving, bad, good = open_saving(), item("FAILURE", token=1), item(token=2)
    raw.call("LPUSH", f"celery-task-meta-{bad[0]}", "a list")
    saving.save(bad, good)
    saving.until(lambda: saving.stored == [1, 2])
    assert f"the result of task {bad[0]} cannot be stored" in caplog.text
    assert store.wait(good[0], TIMEOUT_S)["status"] == "SUCCESS"


def test_a_user_that_may_not_announce_is_told_once(
    open_saving: OpenSaving, raw: BlockingRedis, redis_server: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    raw.call("ACL", "SETUSER", "quiet", "on", ">pw", "~*", "resetchannels", "+@all")
    saving = open_saving(f"redis://quiet:pw@127.0.0.1:{redis_server.port}/{DATABASE}")
    saving.save(item(token=1))
    saving.save(item(token=2))
    saving.until(lambda: saving.stored == [1, 2])
    assert caplog.text.count("results are stored but not announced: NOPERM") == 1


def test_a_lost_connection_is_reported_and_confirms_nothing(
    open_saving: OpenSaving, redis_server: Redis, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    proxy = fault_proxy("127.0.0.1", redis_server.port)
    saving = open_saving(f"redis://127.0.0.1:{proxy.port}/{DATABASE}")
    proxy.cut_after(3)
    saving.save(item(token=1))

    async def lost() -> Exception:
        return await saving.saver.lost

    assert isinstance(saving.run(lost()), ConnectionLost)
    saving.save(item(token=2))
    assert (saving.stored, saving.refused) == ([], [])


def test_a_silent_server_is_lost(
    open_saving: OpenSaving, redis_server: Redis, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    proxy = fault_proxy("127.0.0.1", redis_server.port)
    saving = open_saving(f"redis://127.0.0.1:{proxy.port}/{DATABASE}", redis_backend_health_check_interval=0.2)
    proxy.stall()

    async def lost() -> Exception:
        return await saving.saver.lost

    assert "has not answered" in str(saving.run(lost()))


def test_opening_says_whether_to_try_again(redis_server: Redis) -> None:
    with pytest.raises(ConnectionLost, match="Is it running"):
        Saving(f"redis://127.0.0.1:{free_ports(1)}", settings_with())
    with pytest.raises(SettingsError, match="refused the login"):
        Saving(f"redis://:pw@127.0.0.1:{redis_server.port}", settings_with())


def test_savers_are_found_by_scheme() -> None:
    assert isinstance(open_saver("rediss://h", settings_with(), None), RedisSaver)
    assert type(open_saver("memory://x", settings_with(), None)).__name__ == "MemoryConsumer"
    with pytest.raises(SettingsError, match=r"results cannot be stored at amqp://.*rpc://"):
        open_saver("amqp://h", settings_with(), None)


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")
def test_celery_reads_what_a_worker_stored(open_saving: OpenSaving, url: str) -> None:
    celery = pytest.importorskip("celery")
    app = celery.Celery("reader", backend=url, broker="memory://", set_as_current=False)
    saving, task_id, failed, compressed = open_saving(), new_id(), new_id(), new_id()
    children = [new_id()]
    meta = encode_meta(task_id, "SUCCESS", [1, {"zwei": 2}], children=children)
    failure = encode_meta(failed, "FAILURE", KeyError("nothing"), traceback="Traceback: nothing")
    packed = PayloadCodec(settings_with(result_compression="gzip")).encode(encode_meta(compressed, "SUCCESS", 7))
    saving.save(
        (task_id, "SUCCESS", meta, "", 1), (failed, "FAILURE", failure, "", 2), (compressed, "SUCCESS", packed, "", 3)
    )
    saving.until(lambda: saving.stored == [1, 2, 3])
    result = app.AsyncResult(task_id)
    assert result.get(timeout=TIMEOUT_S) == [1, {"zwei": 2}]
    assert [child.id for child in result.children] == children
    with pytest.raises(KeyError, match="nothing"):
        app.AsyncResult(failed).get(timeout=TIMEOUT_S)
    assert app.AsyncResult(failed).traceback == "Traceback: nothing"
    assert app.AsyncResult(compressed).get(timeout=TIMEOUT_S) == 7
    app.backend.store_result(task_id, None, "STARTED")
    assert app.AsyncResult(task_id).state == "SUCCESS"
    app.backend.result_consumer.stop()
    app.backend.client.close()


def test_saving_costs_little_of_the_worker(open_saving: OpenSaving) -> None:
    saving = open_saving()
    ids = [new_id() for _ in range(6400)]
    items = [(each, "SUCCESS", encode_meta(each, "SUCCESS", 8), "", n) for n, each in enumerate(ids, 1)]
    batches = [items[start : start + 64] for start in range(0, len(items), 64)]

    async def save_all() -> float:
        stored = asyncio.Event()
        saving.saver.source.published = lambda tokens: stored.set()  # type: ignore[method-assign]
        began = time.thread_time()
        for batch in batches:
            saving.saver.source.save(batch)
            await stored.wait()
            stored.clear()
        return time.thread_time() - began

    cost_us = saving.run(save_all()) / len(items) * 1e6
    assert cost_us < 20, f"{cost_us:.1f} µs for each result"  # measured: 2 µs
