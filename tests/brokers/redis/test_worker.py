"""A whole worker on Redis when the server restarts, moves to another machine, or speaks TLS: nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastq.brokers import open_blocking_bus
from fastq.brokers.redis.blocking import BlockingRedis
from fastq.brokers.redis.url import RedisUrl
from fastq.errors import SettingsError
from tests.conftest import missing
from tests.support.certificates import Authority
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import Redis, RedisSentinel, ServerMissing, free_ports
from tests.support.stage import Stage, until

pytestmark = [pytest.mark.redis, pytest.mark.slow]

LASTING = {"appendonly": "yes", "appendfsync": "always"}  # on the disk before it is confirmed


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A function that starts a server with lines of redis.conf, or another kind of server."""
    servers: list[Redis] = []

    def start(kind: type[Redis] = Redis, *arguments: Any) -> Any:
        folder = tmp_path / f"redis{len(servers)}"
        folder.mkdir()
        try:
            servers.append(kind(folder, *arguments))
        except ServerMissing as error:
            missing(error)
            raise
        return servers[-1].start()

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def open_stage(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    """A function that returns a stage on a server of the test's own; more arguments are settings."""
    stages: list[Stage] = []

    def start(url: str, **settings: Any) -> Stage:
        stages.append(Stage("redis", url, tmp_path, **settings))
        return stages[-1]

    yield start
    for stage in stages:
        stage.close()


def ask(server: Redis, *command: str | int) -> Any:
    client = BlockingRedis([RedisUrl("127.0.0.1", server.port)], 5.0)
    try:
        return client.call(*command)
    finally:
        client.close()


@pytest.mark.parametrize("fault", ["away", "hung"])
def test_a_retry_of_what_is_acknowledged_already_survives_a_restart(
    start_redis: Callable[..., Redis],
    open_stage: Callable[..., Stage],
    fault_proxy: Callable[[str, int], FaultProxy],
    tmp_path: Path,
    fault: str,
) -> None:
    """The message exists only in the worker: kept until there is a server, or sent to one that never looked at it."""
    server, gate = start_redis(Redis, LASTING), tmp_path / "gate"
    stage = open_stage(server.url())
    proxy = fault_proxy("127.0.0.1", server.port)
    worker = stage.start_worker("-c", "1", url=proxy.url(stage.url))
    numbers = stage.send(1, "once_more", str(gate))
    stage.ledger.wait_for_starts(1, 10)
    until(lambda: stage.depth() == 0, 5, "it is acknowledged")
    (server.stop if fault == "away" else server.pause)()
    written = proxy.bytes["to_server"]
    gate.touch()
    worker.wait_for_log(r"Task once_more\[.*\] retry")
    if fault == "hung":
        # Longer than what renews a lease, and there is nothing else to say.
        until(lambda: proxy.bytes["to_server"] > written + 600, 5, "the message was written")
        server.kill9()
    server.start()
    stage.wait_for(numbers, 20)
    # To be killed, a process that hangs is woken for a moment: enough, at times, to look at it after all.
    assert stage.ledger.started()[0] in ((2,) if fault == "away" else (2, 3))
    stage.wait_for_settled()


def test_a_server_that_forgets_its_scripts_has_nothing_run_twice(
    start_redis: Callable[..., Redis], open_stage: Callable[..., Stage]
) -> None:
    """As one does after SCRIPT FLUSH, a failover, or by the hand of who manages it."""
    server = start_redis()
    stage = open_stage(server.url())
    worker = stage.start_worker("-c", "2")
    numbers = stage.send(600, "work", 0.002)
    flushed = 0
    while len(stage.ledger.done()) < 600 and worker.exit_code is None and flushed < 3000:
        ask(server, "SCRIPT", "FLUSH", "SYNC")
        flushed += 1
    stage.wait_for(numbers, 20)
    stage.wait_for_settled()
    print(f"the scripts were forgotten {flushed} times")
    assert stage.ledger.started() == dict.fromkeys(numbers, 1)
    assert "Connection to broker lost" not in worker.log()


def test_connections_cut_while_it_postpones_lose_nothing_and_run_nothing_twice(
    start_redis: Callable[..., Redis],
    open_stage: Callable[..., Stage],
    fault_proxy: Callable[[str, int], FaultProxy],
) -> None:
    """What was asked for on the lost connection is asked for again, when the messages may be back in their queue."""
    server = start_redis()
    stage = open_stage(server.url())
    proxy = fault_proxy("127.0.0.1", server.port)
    worker = stage.start_worker("-c", "2", url=proxy.url(stage.url))
    stage.send(1000, eta=time.time() + 3600)
    due = time.time() + 14
    numbers = stage.send(4000, eta=due)

    def postponed() -> int:
        return int(ask(server, "ZCARD", "celery.delayed"))

    for cuts, count in enumerate((300, 900, 1800), start=1):
        until(lambda: postponed() > count, 10, f"{count} are postponed")  # noqa: B023
        proxy.cut()
        # Not cut again while it connects: that is no loss of a connection.
        until(lambda: worker.log().count(" ready.") > cuts, 10, "it is connected again")  # noqa: B023
    print(f"{4000 - postponed()} were left when it was cut for the last time")
    stage.wait_for(numbers, 30)
    assert worker.log().count("Connection to broker lost") == 3
    assert stage.ledger.started() == dict.fromkeys(numbers, 1)
    until(lambda: stage.depth() == 1000, 5, "what has run is settled")


def test_a_worker_goes_on_with_the_new_master_after_a_failover(
    start_redis: Callable[..., Any], open_stage: Callable[..., Stage]
) -> None:
    fast = {"repl-ping-replica-period": "1", "repl-diskless-sync-delay": "0"}
    master = start_redis(Redis, fast)
    replica = start_redis(Redis, {**fast, "replicaof": f"127.0.0.1 {master.port}"})
    sentinel = start_redis(RedisSentinel, master.port)
    until(lambda: b"state=online" in ask(master, "INFO", "replication"), 20, "the replica follows")
    until(lambda: bool(ask(sentinel, "SENTINEL", "REPLICAS", "mymaster")), 20, "the Sentinel knows the replica")
    named = {"master_name": "mymaster"}
    stage = open_stage(sentinel.url(), broker_transport_options=named, result_backend_transport_options=named)
    worker = stage.start_worker("-c", "2")
    result = stage.call("work")
    assert result.get(timeout=10) == 0
    numbers = stage.send(600, "work", 0.005)
    stage.ledger.wait_for_done(100, 15)
    assert stage.redis is not None
    stage.redis.call("WAIT", 1, 3000)
    master.kill9()
    killed_at = time.time()
    stage.wait_for(numbers, 40)
    verdict = stage.verdict("failover")
    first = min(entry.at_unix for entry in stage.ledger.entries() if entry.at_unix > killed_at + 0.5)
    print(f"the first task after the failover ran {first - killed_at:.1f} s after the master was killed")
    assert not verdict.lost
    assert b"role:master" in ask(replica, "INFO", "replication")
    assert "Connection to broker lost" in worker.log()
    assert stage.call("work").get(timeout=10) == 601
    assert worker.stop() == 0


def test_a_worker_over_tls(start_redis: Callable[..., Redis], open_stage: Callable[..., Stage], tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority", "fastq test authority")
    certificate, key = authority.issue("redis")
    files = {"tls-cert-file": str(certificate), "tls-key-file": str(key), "tls-ca-cert-file": str(authority.file)}
    port = free_ports(1)
    start_redis(Redis, {**files, "tls-port": str(port), "tls-auth-clients": "optional"})
    stage = open_stage(f"rediss://127.0.0.1:{port}/2?ssl_cert_reqs=required&ssl_ca_certs={authority.file}")
    worker = stage.start_worker("-c", "2")
    assert stage.call("work").get(timeout=10) == 0
    stage.wait_for(stage.send(1000, "work", 0.0, "x" * 20_000), 20)
    stage.wait_for_settled()
    assert "CERT_NONE" not in worker.log()
    assert worker.stop() == 0
    untrusting = stage.start_worker("-c", "1", url=f"rediss://127.0.0.1:{port}/2", await_ready=False)
    assert untrusting.wait(20) == 78
    assert "certificate" in untrusting.log()


@pytest.mark.parametrize("channels", [("&*pidbox*", "&*celeryev*", "&celery-task-meta-*"), ()], ids=["celerys", "none"])
def test_a_user_with_no_more_channels_than_celery_needs(
    start_redis: Callable[..., Redis], open_stage: Callable[..., Stage], channels: tuple[str, ...]
) -> None:
    """It may not listen to Redis's own channel, which tells of new messages. Without any channel tasks run as well."""
    server = start_redis()
    rules = ("~*", "resetchannels", *channels, "+@all", "-@admin", "-@dangerous")
    ask(server, "ACL", "SETUSER", "modest", "on", ">pw", *rules)
    stage = open_stage(server.url().replace("redis://", "redis://modest:pw@"))
    worker = stage.start_worker("-c", "2")
    warning = worker.wait_for_log("does not tell of new messages .*looking every 0.1 s")
    assert "__redis__:invalidate" in warning[0] or "NOPERM" in warning[0]
    began = time.monotonic()
    for _ in range(3):
        stage.wait_for(stage.send(1), 5)
    print(f"three calls, one after the other, took {time.monotonic() - began:.2f} s")
    if channels:
        assert stage.call("work").get(timeout=10) == 3
        bus = open_blocking_bus(stage.url, stage.client.conf)
        assert [reply for _, reply in bus.ask("ping", {}, 1.0)] == [{"ok": "pong"}]
        bus.close()
    else:
        with pytest.raises(SettingsError, match="celery-task-meta"):
            stage.call("work").get(timeout=10)
    stage.wait_for_settled()
    assert set(stage.ledger.started().values()) == {1}
    assert "Connection to broker lost" not in worker.log()
    assert worker.log().count("looking every") == 1
    assert worker.stop() == 0
