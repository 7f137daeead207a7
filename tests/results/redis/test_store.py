"""Results in Redis as callers see them: lost connections, and Celery on the other side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from fastq.brokers.redis import blocking
from fastq.brokers.redis.blocking import BlockingRedis
from fastq.brokers.redis.url import RedisUrl
from fastq.errors import ConnectionLost, ContentDisallowed, DecodeError, RedisError, ResultTimeout, SettingsError
from fastq.results import open_store, watching
from fastq.results.redis.store import RedisStore
from fastq.settings import Settings
from fastq.wire.ids import new_id
from tests.support.conformance import in_child, meta_of
from tests.support.consumer_in_thread import TIMEOUT_S, within
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import Redis, free_ports

pytestmark = pytest.mark.redis


def settings_with(**values: Any) -> Settings:
    settings = Settings({"fastq_publish_timeout": 5.0, **values})
    settings.freeze()
    return settings


@pytest.fixture
def settings() -> Settings:
    return settings_with()


@pytest.fixture
def url(redis_server: Redis) -> str:
    return redis_server.url(5)


@pytest.fixture
def raw(url: str, redis_server: Redis) -> Iterator[BlockingRedis]:
    """The store's database as it is."""
    client = BlockingRedis([RedisUrl("127.0.0.1", redis_server.port, 5)], TIMEOUT_S)
    yield client
    client.close()


@pytest.fixture
def open_redis(url: str) -> Iterator[Callable[..., RedisStore]]:
    """A function that opens a store with settings of the test's choice."""
    stores: list[RedisStore] = []

    def open_redis(where: str = url, **values: Any) -> RedisStore:
        stores.append(RedisStore(where, settings_with(**values)))
        return stores[-1]

    yield open_redis
    for store in stores:
        store.close()


OpenStore = Callable[..., RedisStore]


# --- what is stored


def test_keys_values_and_lifetimes_are_celerys(open_redis: OpenStore, raw: BlockingRedis) -> None:
    task_id = new_id()
    store = open_redis()
    store.save(task_id, "SUCCESS", meta_of(task_id, result=1))
    key = f"celery-task-meta-{task_id}"
    assert raw.call("GET", key) == meta_of(task_id, result=1)
    assert 86390 <= raw.call("TTL", key) <= 86400


@pytest.mark.parametrize(
    ("values", "state", "lifetime"),
    [
        ({"result_expires": 60.0}, "SUCCESS", 60),
        ({"result_expires": 60.0}, "STARTED", 60),
        ({"result_expires": None}, "SUCCESS", -1),
        ({"result_expires": 0.0}, "SUCCESS", -1),
        ({"result_expires": 0}, "RETRY", -1),
        ({"result_expires": 60.0, "result_failure_expires": 10}, "FAILURE", 10),
        ({"result_expires": 60.0, "result_failure_expires": 10}, "REVOKED", 60),
        ({"result_expires": 60.0, "result_failure_expires": 0}, "FAILURE", -1),
    ],
)
def test_results_expire_as_the_settings_say(
    open_redis: OpenStore, raw: BlockingRedis, values: dict[str, Any], state: str, lifetime: int
) -> None:
    task_id = new_id()
    open_redis(**values).save(task_id, state, meta_of(task_id, state))
    left = raw.call("TTL", f"celery-task-meta-{task_id}")
    assert lifetime - 2 <= left <= lifetime


@pytest.mark.parametrize(("prefix", "expected"), [("app", "app_"), ("app:", "app:"), ("a.", "a."), ("", "")])
def test_a_global_prefix_is_put_in_front(open_redis: OpenStore, raw: BlockingRedis, prefix: str, expected: str) -> None:
    task_id = new_id()
    store = open_redis(result_backend_transport_options={"global_keyprefix": prefix})
    store.save(task_id, "SUCCESS", meta_of(task_id))
    assert raw.call("EXISTS", f"{expected}celery-task-meta-{task_id}") == 1
    assert store.wait(task_id, TIMEOUT_S)["task_id"] == task_id


@pytest.mark.parametrize("state", ["STARTED", "RETRY", "FAILURE", "REVOKED", "PROGRESS"])
def test_a_success_is_not_replaced(open_redis: OpenStore, state: str) -> None:
    task_id = new_id()
    store = open_redis()
    store.save(task_id, "SUCCESS", meta_of(task_id, result="kept"))
    store.save(task_id, state, meta_of(task_id, state))
    meta = store.load(task_id)
    assert meta is not None
    assert (meta["status"], meta["result"]) == ("SUCCESS", "kept")


@pytest.mark.parametrize("result", [{"status": "SUCCESS"}, 'status": "SUCCESS', "\nstatus: SUCCESS\n"])
def test_what_only_looks_like_a_success_is_replaced(open_redis: OpenStore, result: Any) -> None:
    task_id = new_id()
    store = open_redis()
    store.save(task_id, "PROGRESS", meta_of(task_id, "PROGRESS", result))
    store.save(task_id, "FAILURE", meta_of(task_id, "FAILURE"))
    meta = store.load(task_id)
    assert meta is not None
    assert meta["status"] == "FAILURE"


@pytest.mark.parametrize("values", [{"result_compression": "gzip"}, {"result_compression": "zstd"}])
def test_compressed_results_are_stored_kept_and_replaced(
    open_redis: OpenStore, raw: BlockingRedis, values: dict[str, Any]
) -> None:
    store, task_id = open_redis(**values), new_id()
    store.save(task_id, "STARTED", meta_of(task_id, "STARTED"))
    store.save(task_id, "SUCCESS", meta_of(task_id, result="x" * 5000))
    store.save(task_id, "FAILURE", meta_of(task_id, "FAILURE"))
    assert len(raw.call("GET", f"celery-task-meta-{task_id}")) < 500
    assert store.wait(task_id, TIMEOUT_S)["result"] == "x" * 5000
    assert open_redis().wait(task_id, TIMEOUT_S)["result"] == "x" * 5000, "also without the setting"


def test_an_unknown_compression_is_refused_at_once(url: str) -> None:
    with pytest.raises(SettingsError, match="result_compression: unknown compression 'gipz'"):
        RedisStore(url, settings_with(result_compression="gipz"))


def test_what_cannot_be_read_is_an_error_for_who_waits(open_redis: OpenStore, raw: BlockingRedis) -> None:
    store, task_id, called = open_redis(), new_id(), threading.Event()
    metas: list[Any] = []
    raw.call("SET", f"celery-task-meta-{task_id}", b"\x80\x04nonsense")
    with pytest.raises(DecodeError):
        store.wait(task_id, TIMEOUT_S)
    store.watch(task_id, lambda meta: (metas.append(meta), called.set()))  # type: ignore[arg-type,func-returns-value]
    assert called.wait(TIMEOUT_S)
    assert (metas[0]["status"], metas[0]["result"]["exc_type"]) == ("FAILURE", "DecodeError")
    raw.call("LPUSH", f"celery-task-meta-{task_id}x", "a list")
    with pytest.raises(RedisError, match="WRONGTYPE"):
        store.load(f"{task_id}x")


# --- waiting


def test_a_waiting_client_wakes_within_a_millisecond(open_redis: OpenStore) -> None:
    store, other = open_redis(), open_redis()
    delays = []
    for _ in range(30):
        task_id = new_id()
        stored: list[float] = []

        def save(task_id: str = task_id, stored: list[float] = stored) -> None:
            stored.append(time.perf_counter())
            other.save(task_id, "SUCCESS", meta_of(task_id))

        threading.Timer(0.01, save).start()
        store.wait(task_id, TIMEOUT_S)
        delays.append(time.perf_counter() - stored[0])
    assert sorted(delays)[len(delays) // 2] < 0.005, delays  # measured: 0.3 ms, the saving included


def test_waiting_holds_two_connections_and_starts_no_thread(open_redis: OpenStore, raw: BlockingRedis) -> None:
    before = int(raw.call("INFO", "clients").split(b"connected_clients:")[1].split(b"\r")[0])
    store, threads = open_redis(), threading.active_count()
    for _ in range(20):
        task_id = new_id()
        with pytest.raises(ResultTimeout):
            store.wait(task_id, 0.001)
        store.save(task_id, "SUCCESS", meta_of(task_id))
        store.wait(task_id, TIMEOUT_S)
    assert threading.active_count() == threads
    after = int(raw.call("INFO", "clients").split(b"connected_clients:")[1].split(b"\r")[0])
    assert after - before == 2


def test_channels_that_nobody_waits_on_are_given_up(open_redis: OpenStore, raw: BlockingRedis) -> None:
    store = open_redis()
    for _ in range(10):
        with pytest.raises(ResultTimeout):
            store.wait(new_id(), 0.01)
    assert len(raw.call("PUBSUB", "CHANNELS", "celery-task-meta-*")) <= 2


def test_a_lost_connection_is_made_again_and_nothing_is_missed(
    open_redis: OpenStore, redis_server: Redis, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    proxy = fault_proxy("127.0.0.1", redis_server.port)
    store, other = open_redis(f"redis://127.0.0.1:{proxy.port}/5"), open_redis()
    ids = [new_id() for _ in range(6)]
    results: dict[str, Any] = {}
    called = threading.Event()
    threads = [
        threading.Thread(target=lambda key=key: results.update({key: store.wait(key, TIMEOUT_S)["result"]}))
        for key in ids[:4]
    ]
    for thread in threads:
        thread.start()
    store.watch(ids[4], lambda meta: called.set())
    assert within(TIMEOUT_S, lambda: len(_channels(other, ids)) == 5)
    proxy.refuse()
    proxy.cut()
    for number, task_id in enumerate(ids):  # stored while nobody hears it
        if number != 3:
            other.save(task_id, "SUCCESS", meta_of(task_id, result=number))
    proxy.refuse(False)
    assert within(TIMEOUT_S, lambda: len(results) == 3), results
    other.save(ids[3], "SUCCESS", meta_of(ids[3], result=3))  # stored afterwards, and pushed
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert results == {task_id: number for number, task_id in enumerate(ids[:4])}
    assert called.wait(TIMEOUT_S)


def _channels(store: RedisStore, ids: list[str]) -> list[bytes]:
    (found,) = store._use([("PUBSUB", "NUMSUB", *(f"celery-task-meta-{task_id}" for task_id in ids))])
    return [name for name, count in zip(found[::2], found[1::2], strict=True) if count]


def test_a_stalled_server_is_noticed_while_waiting(
    open_redis: OpenStore,
    redis_server: Redis,
    fault_proxy: Callable[[str, int], FaultProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocking, "PING_EVERY_S", 0.2)
    proxy = fault_proxy("127.0.0.1", redis_server.port)
    store, other, task_id = open_redis(f"redis://127.0.0.1:{proxy.port}/5"), open_redis(), new_id()
    results: list[Any] = []
    waiting = threading.Thread(target=lambda: results.append(store.wait(task_id, TIMEOUT_S)))
    waiting.start()
    assert within(TIMEOUT_S, lambda: bool(_channels(other, [task_id])))
    proxy.half_open()  # the server's side is gone, the client is not told
    other.save(task_id, "SUCCESS", meta_of(task_id))
    waiting.join(TIMEOUT_S)
    assert [meta["status"] for meta in results] == ["SUCCESS"]


def test_a_server_that_was_never_there_is_an_error_at_once(open_redis: OpenStore) -> None:
    store = open_redis(f"redis://127.0.0.1:{free_ports(1)}")
    for use in (lambda: store.wait("x", None), lambda: store.load("x"), lambda: store.watch("x", print)):
        with pytest.raises(ConnectionLost, match="Is it running"):
            use()


def test_a_server_that_stays_away_is_an_error_in_the_end(
    open_redis: OpenStore, redis_server: Redis, fault_proxy: Callable[[str, int], FaultProxy]
) -> None:
    proxy = fault_proxy("127.0.0.1", redis_server.port)
    store = open_redis(f"redis://127.0.0.1:{proxy.port}/5", fastq_publish_timeout=0.5)
    with pytest.raises(ResultTimeout):
        store.wait("x", 0.01)
    proxy.refuse()
    proxy.cut()
    began = time.monotonic()
    with pytest.raises(ResultTimeout):
        store.wait("x", 0.2)
    with pytest.raises(ConnectionLost):
        store.wait("x", None)
    assert time.monotonic() - began < 5.0


def test_closing_ends_a_wait(open_redis: OpenStore) -> None:
    store, other, task_id = open_redis(), open_redis(), new_id()
    errors: list[Exception] = []

    def wait() -> None:
        try:
            store.wait(task_id, TIMEOUT_S)
        except ConnectionLost as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert within(TIMEOUT_S, lambda: bool(_channels(other, [task_id])))
    store.close()
    waiting.join(TIMEOUT_S)
    assert "was closed" in str(errors[0])


def test_the_thread_of_watchers_ends_when_there_is_nobody_to_watch_for(
    open_redis: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "LINGER_S", 0.1)
    store = open_redis()
    for _ in range(2):
        task_id, called = new_id(), threading.Event()
        store.watch(task_id, lambda meta, called=called: called.set())  # type: ignore[misc]
        store.save(task_id, "SUCCESS", meta_of(task_id))
        assert called.wait(TIMEOUT_S)
        assert within(TIMEOUT_S, lambda: not any(each.name == "fastq-redis-results" for each in threading.enumerate()))


def test_a_failing_callback_does_not_stop_the_others(open_redis: OpenStore, caplog: pytest.LogCaptureFixture) -> None:
    store, bad, good, called = open_redis(), new_id(), new_id(), threading.Event()
    store.watch(bad, lambda meta: 1 / 0)  # type: ignore[arg-type,return-value]
    store.watch(good, lambda meta: called.set())
    for task_id in (bad, good):
        store.save(task_id, "SUCCESS", meta_of(task_id))
    assert called.wait(TIMEOUT_S)
    # Which of the two comes first is open.
    assert within(TIMEOUT_S, lambda: "division by zero" in caplog.text)


def test_a_forked_child_has_connections_of_its_own(open_redis: OpenStore) -> None:
    store, task_id = open_redis(), new_id()
    with pytest.raises(ResultTimeout):
        store.wait(task_id, 0.05)
    assert in_child(lambda: store.save(task_id, "SUCCESS", meta_of(task_id, result=3))) == "returned None"
    assert in_child(lambda: store.wait(task_id, TIMEOUT_S)["result"]) == "returned 3"
    assert store.wait(task_id, TIMEOUT_S)["result"] == 3


# --- Celery on the other side

#: Celery's own use of redis-py.
celerys_warning = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")


def celery_app(url: str, **conf: Any) -> Any:
    celery = pytest.importorskip("celery")
    app = celery.Celery("results", backend=url, broker="memory://", set_as_current=False)
    app.conf.update(broker_connection_retry_on_startup=True, **conf)
    return app


@celerys_warning
@pytest.mark.parametrize("serializer", ["json", "pickle", "msgpack", "yaml"])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_what_celery_stored_is_read_and_a_success_of_its_is_kept(
    open_redis: OpenStore, url: str, serializer: str, compression: str | None
) -> None:
    conf = {"result_serializer": serializer, "accept_content": ["json", serializer], "result_compression": compression}
    backend = celery_app(url, **conf).backend
    store, task_id, failed = open_redis(**conf), new_id(), new_id()
    threading.Timer(0.05, backend.store_result, (task_id, [1, "zwei"], "SUCCESS")).start()
    assert store.wait(task_id, TIMEOUT_S)["result"] == [1, "zwei"]
    store.save(task_id, "STARTED", meta_of(task_id, "STARTED"))
    assert store.load(task_id)["status"] == "SUCCESS"  # type: ignore[index]
    backend.store_result(failed, ValueError("no"), "FAILURE", traceback="Traceback: no")
    meta = store.wait(failed, TIMEOUT_S)
    assert (meta["status"], meta["traceback"]) == ("FAILURE", "Traceback: no")
    store.save(failed, "STARTED", meta_of(failed, "STARTED"))
    assert store.load(failed)["status"] == "STARTED"  # type: ignore[index]
    backend.client.close()


@celerys_warning
def test_a_pickled_result_is_refused_unless_accepted(open_redis: OpenStore, url: str) -> None:
    conf = {"result_serializer": "pickle", "accept_content": ["json", "pickle"]}
    backend, task_id = celery_app(url, **conf).backend, new_id()
    backend.store_result(task_id, {1, 2}, "SUCCESS")
    with pytest.raises(ContentDisallowed, match="add it to accept_content"):
        open_redis(result_serializer="pickle").wait(task_id, TIMEOUT_S)
    store = open_redis(result_serializer="pickle", result_accept_content=["pickle"])
    assert store.wait(task_id, TIMEOUT_S)["result"] == {1, 2}
    backend.client.close()


def test_celery_waits_for_what_is_stored_here(open_redis: OpenStore, url: str) -> None:
    options = {"global_keyprefix": "shared"}
    app = celery_app(url, result_backend_transport_options=options)
    store, task_id, failed = open_redis(result_backend_transport_options=options), new_id(), new_id()
    result = app.AsyncResult(task_id)
    threading.Timer(0.1, store.save, (task_id, "SUCCESS", meta_of(task_id, result={"a": 1}))).start()
    assert result.get(timeout=TIMEOUT_S) == {"a": 1}
    error = {"exc_type": "ValueError", "exc_message": ["no"], "exc_module": "builtins"}
    store.save(failed, "FAILURE", meta_of(failed, "FAILURE", error))
    with pytest.raises(ValueError, match="no"):
        app.AsyncResult(failed).get(timeout=TIMEOUT_S)
    app.backend.result_consumer.stop()
    app.backend.client.close()


CELERY_WORKER = """
import celery
app = celery.Celery("tasks", broker={broker!r}, backend={backend!r})
app.conf.update(task_track_started=True, result_extended=True)

@app.task(name="add")
def add(a, b):
    return a + b

@app.task(name="fail")
def fail():
    raise KeyError("nothing")
"""


def test_results_of_a_celery_worker_are_waited_for(open_redis: OpenStore, redis_server: Redis, tmp_path: Any) -> None:
    celery = pytest.importorskip("celery")
    broker = redis_server.url(9)
    (tmp_path / "tasks.py").write_text(CELERY_WORKER.format(broker=broker, backend=redis_server.url(5)))
    command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-P", "solo", "--without-mingle"]
    app = celery.Celery("client", broker=broker, backend="disabled://", set_as_current=False)
    store, ids = open_redis(), [str(uuid.uuid4()) for _ in range(2)]
    with (tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen(
            [*command, "--without-gossip"], cwd=tmp_path, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": "."}
        )
    try:
        app.send_task("add", (2, 3), task_id=ids[0])
        app.send_task("fail", task_id=ids[1])
        added, failed = store.wait(ids[0], 60.0), store.wait(ids[1], 60.0)
    finally:
        worker.terminate()
        worker.wait(30.0)
        app.close()
    assert (added["status"], added["result"], added["name"]) == ("SUCCESS", 5, "add")
    assert (failed["status"], failed["result"]["exc_type"]) == ("FAILURE", "KeyError")
    assert json.dumps(failed["result"]["exc_message"]) == '["nothing"]'


def test_expires_may_be_what_celery_makes_of_a_timedelta(open_redis: OpenStore, raw: BlockingRedis) -> None:
    task_id = new_id()
    open_redis(result_expires=timedelta(minutes=2).total_seconds()).save(task_id, "SUCCESS", meta_of(task_id))
    assert 118 <= raw.call("TTL", f"celery-task-meta-{task_id}") <= 120


def test_a_store_is_found_by_every_scheme_of_redis(settings: Settings) -> None:
    options = {"result_backend_transport_options": {"master_name": "m"}}
    for where in ("redis", "redis://h", "rediss://h", "redis+socket:///s", "unix:///s", "sentinel://h"):
        store = open_store(where, settings_with(**options))
        assert isinstance(store, RedisStore)
        assert store.reply_address() is None  # type: ignore[func-returns-value]
        store.close()
