"""sqlite://: what is particular to a file shared by processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastq import FastQ
from fastq.brokers import open_publisher
from fastq.brokers.sqlite import bells, database
from fastq.brokers.sqlite.broker import SqliteConsumer, live_workers
from fastq.errors import ConnectionLost, PublishError, SettingsError
from fastq.interfaces import Publisher, ResultStore
from fastq.results import open_store
from fastq.results.sqlite.store import SqliteStore
from fastq.settings import Settings
from fastq.wire.ids import new_id
from fastq.wire.message import Message
from tests import ROOT
from tests.support.conformance import (
    in_child,
    message,
    meta_of,
)
from tests.support.consumer_in_thread import ACK, REJECT, TIMEOUT_S, Consuming, within

PUSHED_S = 0.6  # far below every interval at which anything looks by itself, with room for a busy machine


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fastq.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def settings() -> Settings:
    settings = Settings({"fastq_publish_timeout": 2.0})
    settings.freeze()
    return settings


@pytest.fixture
def publisher(url: str, settings: Settings) -> Iterator[Publisher]:
    publisher = open_publisher(url, settings)
    yield publisher
    publisher.close()


@pytest.fixture
def store(url: str, settings: Settings) -> Iterator[SqliteStore]:
    store = SqliteStore(url, settings)
    yield store
    store.close()


@pytest.fixture
def consumer(url: str, settings: Settings) -> Iterator[Consuming]:
    with Consuming(url, settings) as consumer:
        yield consumer


@pytest.fixture
def other_process(url: str) -> Iterator[Callable[[str], OtherProcess]]:
    started: list[OtherProcess] = []

    def start(script: str) -> OtherProcess:
        started.append(OtherProcess(url, script))
        return started[-1]

    yield start
    for process in started:
        process.kill()


class OtherProcess:
    """A script with ``url``, ``settings``, the names of this module, and ``say``, which writes a line for ``hear``."""

    def __init__(self, url: str, script: str) -> None:
        prelude = (
            "import json, sys\nfrom tests.brokers.sqlite.test_sqlite import *\n"
            f"url, settings = {url!r}, Settings({{'fastq_publish_timeout': 2.0}})\n"
            "def say(*words): print(json.dumps(words), flush=True)\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", prelude + script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def hear(self) -> list[Any]:
        """Return the next line it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the process ended with {self.process.wait(TIMEOUT_S)}"
        said: list[Any] = json.loads(line)
        return said

    def go_on(self) -> None:
        """Let a script that reads a line continue."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def rows_of(path: Path, query: str) -> list[Any]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


# --- several processes ------------------------------------------------------------------------------------------------

CLAIM_AND_HANG = """
with Consuming(url, settings) as consumer:
    say(*[row[0] for row in consumer.rows(5)])
    sys.stdin.readline()
"""


def test_what_a_killed_worker_held_is_delivered_again_and_counted(
    publisher: Publisher, url: str, settings: Settings, other_process: Callable[[str], OtherProcess]
) -> None:
    publisher.publish([message(n) for n in range(5)])
    victim = other_process(CLAIM_AND_HANG)
    victim.hear()
    with Consuming(url, settings) as consumer:
        assert [worker.pid for worker in live_workers(url)] == [victim.process.pid, os.getpid()]
        consumer.fence()
        assert consumer.record.rows == []
        victim.kill()
        rows = consumer.rows(5, timeout_s=5.0)
        assert [(row[3], row[4]) for row in rows] == [(str(n).encode(), 2) for n in range(5)]
        assert [worker.pid for worker in live_workers(url)] == [os.getpid()]


def test_a_starting_worker_takes_over_from_a_dead_one_at_once(
    publisher: Publisher, url: str, settings: Settings, other_process: Callable[[str], OtherProcess]
) -> None:
    publisher.publish([message(n) for n in range(5)])
    victim = other_process(CLAIM_AND_HANG)
    victim.hear()
    victim.kill()
    with Consuming(url, settings) as consumer:
        assert [row[4] for row in consumer.rows(5, PUSHED_S)] == [2] * 5


def test_a_forked_child_does_not_keep_its_dead_parent_alive(
    publisher: Publisher, url: str, settings: Settings, other_process: Callable[[str], OtherProcess]
) -> None:
    publisher.publish([message(n) for n in range(5)])
    victim = other_process(
        "consumer = Consuming(url, settings)\nconsumer.rows(5)\nchild = os.fork()\n"
        "if child == 0:\n    sys.stdin.readline(); os._exit(0)\n"
        "say(child)\nsignal.pause()\n"
    )
    (child,) = victim.hear()
    try:
        os.kill(victim.process.pid, signal.SIGKILL)
        with Consuming(url, settings) as consumer:
            consumer.rows(5, timeout_s=5.0)
        os.kill(child, 0)  # it was there all the time
    finally:
        os.kill(child, signal.SIGKILL)


def test_each_message_runs_once_with_several_producers_and_workers(
    tmp_path: Path, path: Path, url: str, other_process: Callable[[str], OtherProcess]
) -> None:
    log = tmp_path / "ran.log"
    work = f"""
log = os.open({str(log)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
with Consuming(url, settings, window=10) as consumer:
    say("ready")
    seen = 0
    while True:
        consumer.record.wait(lambda: len(consumer.record.rows) > seen, 60)
        rows = consumer.record.rows[seen:]
        seen += len(rows)
        os.write(log, b"".join(b"%b %d\\n" % (row[3], row[4]) for row in rows))
        consumer.settle(ACK, *[row[0] for row in rows])
        consumer.allow(10)
"""
    produce = """
publisher = open_publisher(url, settings)
for n in range(0, 150, 3):
    publisher.publish([message(f"{name}-{n}")])
    publisher.publish([message(f"{name}-{n + 1}"), message(f"{name}-{n + 2}")])
publisher.close()
say("done")
"""
    workers = [other_process(work) for _ in range(2)]
    for worker in workers:
        assert worker.hear() == ["ready"]
    producers = [other_process(f"name = {name!r}\n{produce}") for name in ("a", "b", "c")]
    for producer in producers:
        assert producer.hear() == ["done"]
    assert within(20.0, lambda: rows_of(path, "SELECT count(*) FROM messages") == [(0,)])
    ran = log.read_text().splitlines()
    assert sorted(ran) == sorted(f"{name}-{n} 1" for name in ("a", "b", "c") for n in range(150))


def test_a_publish_wakes_an_idle_worker(publisher: Publisher, consumer: Consuming) -> None:
    for count in range(1, 11):
        began = time.monotonic()
        publisher.publish([message(count)])
        consumer.rows(count)
        assert time.monotonic() - began < PUSHED_S


def test_a_result_wakes_the_client_that_sent_the_message(
    consumer: Consuming, store: SqliteStore, other_process: Callable[[str], OtherProcess]
) -> None:
    address = store.reply_address()
    for size in (10, 100_000):
        for _ in range(5):
            task_id = new_id()
            item = (task_id, "SUCCESS", meta_of(task_id, result="x" * size), address, 0)
            threading.Timer(0.02, consumer.save, (item,)).start()
            began = time.monotonic()
            assert len(store.wait(task_id, TIMEOUT_S)["result"]) == size
            assert time.monotonic() - began < PUSHED_S


def test_a_result_wakes_a_process_that_did_not_send_the_message(consumer: Consuming, store: SqliteStore) -> None:
    task_id = new_id()
    threading.Timer(0.3, consumer.save, ((task_id, "SUCCESS", meta_of(task_id), "somebody-else", 0),)).start()
    began = time.monotonic()
    store.wait(task_id, TIMEOUT_S)
    assert time.monotonic() - began < 0.3 + PUSHED_S


def test_no_waiter_is_left_in_the_file(consumer: Consuming, store: SqliteStore, path: Path) -> None:
    with pytest.raises(TimeoutError):
        store.wait("never", 0.2)
    task_id = new_id()
    threading.Timer(0.2, consumer.save, ((task_id, "SUCCESS", meta_of(task_id), "", 0),)).start()
    store.wait(task_id, TIMEOUT_S)
    assert rows_of(path, "SELECT * FROM waiters") == []


def test_a_client_that_reads_nothing_does_not_hold_up_others(
    url: str, settings: Settings, consumer: Consuming, store: SqliteStore
) -> None:
    silent = SqliteStore(url, settings)
    deaf, heard = silent.reply_address(), store.reply_address()
    for _ in range(50):
        consumer.save(*((new_id(), "SUCCESS", meta_of("x", result="y" * 3000), deaf, 0) for _ in range(20)))
    task_id = new_id()
    threading.Timer(0.05, consumer.save, ((task_id, "SUCCESS", meta_of(task_id), heard, 0),)).start()
    began = time.monotonic()
    store.wait(task_id, TIMEOUT_S)
    assert time.monotonic() - began < 0.05 + PUSHED_S
    silent.close()


def test_a_burst_of_results_reaches_a_client_that_falls_behind(consumer: Consuming, store: SqliteStore) -> None:
    address = store.reply_address()
    ids = [new_id() for _ in range(300)]
    found: list[str] = []
    done = threading.Event()

    def on_result(meta: Any) -> None:
        time.sleep(0.0005)
        found.append(meta["task_id"])
        if len(found) == len(ids):
            done.set()

    for task_id in ids:
        store.watch(task_id, on_result)
    for task_id in ids:
        consumer.save((task_id, "SUCCESS", meta_of(task_id), address, 0))
    assert done.wait(4.0), "before the second look after 5 s"
    assert sorted(found) == sorted(ids)


def test_a_forked_process_publishes_and_waits_by_itself(
    publisher: Publisher, store: SqliteStore, consumer: Consuming
) -> None:
    address = store.reply_address()
    publisher.publish([message("parent")])

    def work() -> object:
        publisher.publish([message("child")])
        own = store.reply_address()
        store.save("from-child", "SUCCESS", meta_of("from-child"))
        return own != address, store.wait("from-child", 1.0)["status"]

    assert in_child(work) == "returned (True, 'SUCCESS')"
    assert consumer.bodies(2) == [b"parent", b"child"]
    publisher.publish([message("parent again")])
    task_id = new_id()
    threading.Timer(0.05, consumer.save, ((task_id, "SUCCESS", meta_of(task_id), address, 0),)).start()
    assert store.wait(task_id, PUSHED_S)["task_id"] == task_id


# --- workers ----------------------------------------------------------------------------------------------------------


def test_live_workers_are_listed_with_what_they_do(url: str, settings: Settings) -> None:
    assert live_workers(url) == []
    with Consuming(url, settings, ("alpha", "beta")):
        (worker,) = live_workers(url)
        assert (worker.pid, worker.queues) == (os.getpid(), ("alpha", "beta"))
        assert "@" in worker.name
        assert abs(time.time() - worker.started) < 10
    assert live_workers(url) == []


def test_a_worker_is_listed_under_the_name_it_was_given(
    url: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Consuming(url, settings, ()) as consumer:
        assert live_workers(url) == []
        consumer.consumer.name = "mine@here"
        consumer.run(consumer.consumer.consume(["celery"], 1))
        assert [worker.name for worker in live_workers(url)] == ["mine@here"]


def test_consuming_again_keeps_what_is_held(publisher: Publisher, consumer: Consuming, path: Path) -> None:
    publisher.publish([message(1), message(2, "other")])
    ((tag, *_),) = consumer.rows(1)
    consumer.run(consumer.consumer.cancel())
    consumer.run(consumer.consumer.consume(["celery", "other"], 10))
    assert consumer.bodies(2) == [b"1", b"2"]
    consumer.settle(ACK, tag)
    consumer.fence()
    assert rows_of(path, "SELECT body FROM messages") == [(b"2",)]


def test_rejected_messages_are_kept_as_dead_letters(publisher: Publisher, consumer: Consuming, path: Path) -> None:
    bad = message("bad")
    publisher.publish([bad])
    consumer.settle(REJECT, consumer.rows(1)[0][0])
    consumer.fence()
    assert rows_of(path, "SELECT deliveries, reason, props, body FROM dead") == [(1, "rejected", bad.props, b"bad")]
    assert rows_of(path, "SELECT * FROM messages") == []


def test_what_was_given_to_another_worker_is_not_deleted_by_the_first(
    publisher: Publisher, consumer: Consuming, path: Path
) -> None:
    publisher.publish([message(1)])
    tag = consumer.rows(1)[0][0]
    connection = sqlite3.connect(path, timeout=TIMEOUT_S)
    with connection:
        connection.execute("UPDATE claimed SET owner = owner + 1")
    connection.close()
    consumer.settle(ACK, tag)
    consumer.fence()
    assert rows_of(path, "SELECT count(*) FROM messages") == [(1,)]


def test_a_worker_that_was_taken_for_dead_notices(publisher: Publisher, consumer: Consuming, path: Path) -> None:
    connection = sqlite3.connect(path, timeout=TIMEOUT_S)
    with connection:
        connection.execute("DELETE FROM workers")
    connection.close()
    assert "taken" in str(consumer.lost()) or "took" in str(consumer.lost())


def test_many_delayed_messages_become_due_in_order(publisher: Publisher, url: str, settings: Settings) -> None:
    due = time.time() + 0.2
    publisher.publish([message(n, eta=due + n / 10_000) for n in range(2_500)])
    with Consuming(url, settings, window=5_000) as consumer:
        bodies = consumer.bodies(2_500)
        assert publisher.depth("celery") == 0
    assert sorted(bodies, key=int) == [str(n).encode() for n in range(2_500)]


def test_a_hundred_queues_get_a_share_each(publisher: Publisher, url: str, settings: Settings) -> None:
    names = [f"queue-{n}" for n in range(100)]
    publisher.publish([message(n, name) for name in names for n in range(3)])
    with Consuming(url, settings, names, window=100) as consumer:
        assert sorted(row[1] for row in consumer.rows(100)) == sorted(name.encode() for name in names)
        consumer.allow(200)
        consumer.rows(300)


def test_one_result_that_cannot_be_stored_does_not_hold_up_the_others(
    consumer: Consuming, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = new_id(), "\ud800"
    consumer.save((bad, "SUCCESS", b"{}", "", 0), (good, "SUCCESS", meta_of(good), "", 5))
    consumer.stored(5)
    assert store.load(good) is not None
    assert "cannot be stored" in caplog.text


def test_one_message_that_cannot_be_stored_is_refused_alone(consumer: Consuming, publisher: Publisher) -> None:
    bad = Message("", "\ud800", b"", b"1")
    consumer.publish((1, bad), (2, message(2)))
    consumer.stored(2)
    consumer.record.wait(lambda: bool(consumer.record.refused))
    assert consumer.record.refused[0][0] == 1
    with pytest.raises(PublishError):
        publisher.publish([bad])
    publisher.publish([message(3)])
    assert consumer.bodies(2) == [b"2", b"3"]


def test_expired_results_are_swept(url: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastq.brokers.sqlite import turns

    monkeypatch.setattr(turns, "FIRST_UPKEEP_S", 0.1)
    settings = Settings({"result_expires": 100.0})
    store = open_store(url, settings)
    store.save("new", "SUCCESS", meta_of("new"))
    store.save("old", "SUCCESS", meta_of("old"))
    connection = sqlite3.connect(path, timeout=TIMEOUT_S)
    with connection:
        connection.execute("UPDATE results SET saved = saved - 200, seq = 0 WHERE id = 'old'")
        connection.execute("INSERT INTO waiters VALUES ('x', 'c-1-0123456789abcdef')")
    connection.close()
    with Consuming(url, settings):
        assert within(5.0, lambda: store.load("old") is None)
        assert within(5.0, lambda: rows_of(path, "SELECT * FROM waiters") == [])
    assert store.load("new") is not None
    store.close()


# --- the file and its folder ------------------------------------------------------------------------------------------


def test_the_file_is_for_its_owner_only(publisher: Publisher, consumer: Consuming, path: Path) -> None:
    publisher.publish([message(1)])
    consumer.rows(1)
    for name in ("fastq.db", "fastq.db-wal", "fastq.db-shm"):
        assert stat.S_IMODE((path.parent / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((path.parent / "fastq.db-bells").stat().st_mode) == 0o700


def test_a_path_beyond_the_limit_of_sockets_works(tmp_path: Path, settings: Settings) -> None:
    folder = tmp_path.joinpath(*["a-rather-long-folder-name"] * 8)
    folder.mkdir(parents=True)
    url = f"sqlite:///{folder}/fastq.db"
    assert len(url) > 200
    publisher = open_publisher(url, settings)
    with Consuming(url, settings) as consumer:
        began = time.monotonic()
        publisher.publish([message(1)])
        consumer.rows(1)
        assert time.monotonic() - began < PUSHED_S
    publisher.close()


@pytest.mark.parametrize("name", ["fastq.db", "fastq.db-wal", "fastq.db-bells"])
def test_a_symbolic_link_is_refused(tmp_path: Path, path: Path, url: str, settings: Settings, name: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / name).symlink_to(target / "elsewhere" if name != "fastq.db-bells" else target)
    with pytest.raises(SettingsError, match=name):
        Consuming(url, settings)
    assert list(target.iterdir()) == []


def test_a_folder_that_everybody_may_write_is_refused(tmp_path: Path, url: str, settings: Settings) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(SettingsError, match="chmod o-w"):
        Consuming(url, settings)
    tmp_path.chmod(0o1777)
    Consuming(url, settings).close()


def test_a_missing_folder_is_named(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(SettingsError, match=r"missing.*Create it"):
        Consuming(f"sqlite:///{tmp_path}/missing/fastq.db", settings)


NOBODY = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may use somebody else's file")
def test_who_owns_the_file_makes_root_change_no_other_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, precious = tmp_path / "fastq.db", tmp_path / "precious"
    for each in (path, precious):
        each.touch(0o600)
    for each in (path, tmp_path):
        os.chown(each, NOBODY, NOBODY)
    mkdir, folder = os.mkdir, tmp_path / "fastq.db-bells"

    def swapped(name: str, mode: int) -> None:
        mkdir(name, mode)
        os.rmdir(name)
        os.symlink(precious, name)

    monkeypatch.setattr(os, "mkdir", swapped)
    with pytest.raises(SettingsError):
        bells.BellFolder(str(path))
    assert precious.stat().st_uid == 0
    monkeypatch.undo()
    folder.unlink()

    class Swapping(socket.socket):
        def bind(self, address: Any) -> None:
            super().bind(address)
            os.unlink(address)
            os.symlink(precious, address)

    opened = bells.BellFolder(str(path))
    assert folder.stat().st_uid == NOBODY
    monkeypatch.setattr(bells.socket, "socket", Swapping)
    with pytest.raises(SettingsError, match="no socket can be made"):
        opened.bind(bells.CLIENT)
    assert stat.S_IMODE(precious.stat().st_mode) == 0o600
    monkeypatch.undo()
    bell = opened.bind(bells.CLIENT)
    assert stat.S_IMODE((folder / bell.name).stat().st_mode) == 0o666
    opened.close()


def test_a_bell_folder_of_somebody_else_is_refused(tmp_path: Path, url: str, settings: Settings) -> None:
    (tmp_path / "fastq.db-bells").mkdir(mode=0o755)
    with pytest.raises(SettingsError, match="mode 755"):
        Consuming(url, settings)


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite://host/x.db", "sqlite:///a.db?x=1"]
)
def test_a_url_without_a_usable_file_is_refused(url: str, settings: Settings) -> None:
    with pytest.raises(SettingsError, match="sqlite:"):
        open_publisher(url, settings)


def test_a_relative_path_starts_at_the_working_folder(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    publisher = open_publisher("sqlite:///here%20it%20is.db", settings)
    monkeypatch.chdir("/")
    publisher.publish([message(1)])
    publisher.close()
    assert (tmp_path / "here it is.db").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(("mode", "remedy"), [(0o644, "not writable for user 65534"), (0o600, "user 65534")])
def test_a_file_that_may_not_be_written_is_named(settings: Settings, mode: int, remedy: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        os.chmod(folder, 0o755)
        url = f"sqlite:///{folder}/fastq.db"
        publisher = open_publisher(url, settings)
        publisher.declare("celery")
        publisher.close()
        os.chmod(f"{folder}/fastq.db", mode)

        def work_as_nobody() -> None:
            os.setegid(65534)
            os.seteuid(65534)
            open_publisher(url, settings).publish([message(1)])

        answer = in_child(work_as_nobody)
        assert answer.startswith(f"raised PublishError: not published: {folder}/fastq.db")
        assert remedy in answer


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path, url: str, settings: Settings) -> None:
    path.write_bytes(b"Dear diary, " * 1000)
    before = path.read_bytes()
    with pytest.raises(SettingsError, match=r"sqlite3 .* \.recover"):
        Consuming(url, settings)
    with pytest.raises(PublishError, match=r"\.recover"):
        open_publisher(url, settings).publish([message(1)])
    assert path.read_bytes() == before


def test_a_file_that_is_damaged_while_in_use_ends_the_connection(
    publisher: Publisher, consumer: Consuming, path: Path, other_process: Callable[[str], OtherProcess]
) -> None:
    publisher.publish([message("x" * 5000) for _ in range(50)])
    tags = [row[0] for row in consumer.rows(50)]
    # In another process: to close the file in this one would take SQLite's locks away.
    vandal = other_process(
        f"connection = sqlite3.connect({str(path)!r}, timeout=10)\n"
        "connection.execute('PRAGMA wal_checkpoint(TRUNCATE)')\nconnection.close()\n"
        f"with open({str(path)!r}, 'r+b') as file:\n"
        "    file.seek(4096); file.write(os.urandom(100_000))\n"
        "say('done')\n"
    )
    assert vandal.hear() == ["done"]
    with pytest.raises(PublishError, match="damaged"):
        publisher.publish([message(n) for n in range(100)])
    consumer.settle(ACK, *tags)
    error = consumer.lost()
    assert isinstance(error, SettingsError)
    assert "damaged" in str(error)


def test_the_database_of_another_program_is_refused(path: Path, url: str, settings: Settings) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE kombu_message (id INTEGER)")
    connection.commit()
    connection.close()
    with pytest.raises(SettingsError, match="another program"):
        Consuming(url, settings)


def test_a_file_of_a_later_format_is_refused(publisher: Publisher, path: Path, url: str, settings: Settings) -> None:
    publisher.declare("celery")
    publisher.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(SettingsError, match="Upgrade fastq"):
        Consuming(url, settings)


def test_a_file_that_is_replaced_ends_the_consumer_and_not_the_publisher(
    publisher: Publisher, consumer: Consuming, path: Path, url: str, settings: Settings
) -> None:
    publisher.publish([message(1)])
    consumer.rows(1)
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink()
    error = consumer.lost()
    assert isinstance(error, ConnectionLost)
    assert "removed or replaced" in str(error)

    def arrives() -> bool:
        publisher.publish([message(2)])
        return path.exists()

    assert within(5.0, arrives)
    with Consuming(url, settings) as second:
        assert second.bodies(1)[0] == b"2"


def test_a_bell_folder_that_is_removed_is_made_again(
    publisher: Publisher, consumer: Consuming, store: SqliteStore, path: Path
) -> None:
    address = store.reply_address()
    publisher.publish([message(1)])
    consumer.rows(1)
    folder = path.with_name("fastq.db-bells")
    for bell in folder.iterdir():
        bell.unlink()
    folder.rmdir()
    assert within(3.0, lambda: folder.exists() and any(name.startswith("w-") for name in os.listdir(folder)))
    began = time.monotonic()
    publisher.publish([message(2)])
    consumer.rows(2)
    assert time.monotonic() - began < PUSHED_S
    task_id = new_id()
    threading.Timer(0.3, consumer.save, ((task_id, "SUCCESS", meta_of(task_id), address, 0),)).start()
    assert store.wait(task_id, TIMEOUT_S)["task_id"] == task_id


def test_bells_of_dead_processes_are_removed(
    publisher: Publisher, consumer: Consuming, path: Path, other_process: Callable[[str], OtherProcess]
) -> None:
    dead = other_process(CLAIM_AND_HANG.replace("5", "1") + "\n")
    client = other_process("store = SqliteStore(url, settings)\nsay(store.reply_address())\nsignal.pause()\n")
    (address,) = client.hear()
    client.kill()
    assert (path.parent / "fastq.db-bells" / address).exists()
    consumer.save(("x", "SUCCESS", meta_of("x"), address, 1))
    consumer.stored(1)
    assert within(2.0, lambda: not (path.parent / "fastq.db-bells" / address).exists())
    dead.kill()


def test_nothing_is_left_open_or_lying_about(path: Path, url: str, settings: Settings) -> None:
    def descriptors() -> set[str]:
        return {
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")
        }

    before = descriptors()
    publisher, store = open_publisher(url, settings), open_store(url, settings)
    with Consuming(url, settings) as consumer:
        publisher.publish([message(1)])
        consumer.rows(1)
        store.reply_address()
        store.watch("x", print)
    publisher.close()
    store.close()
    assert within(2.0, lambda: not {name for name in descriptors() - before if str(path) in name})
    assert os.listdir(f"{path}-bells") == []
    assert sorted(os.listdir(path.parent)) == ["fastq.db", "fastq.db-bells"]


# --- a disk that is full, a lock that is held -------------------------------------------------------------------------

FULL_DISK = """
import resource
publisher = open_publisher(url, settings)
publisher.publish([message(n) for n in range(40)])
with Consuming(url, settings, window=20) as consumer:
    tags = [row[0] for row in consumer.rows(20)]
    limit = max(os.stat(path).st_size for path in (PATH, PATH + "-wal")) // 4096 * 4096
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    refused = None
    for n in range(2000):
        try:
            publisher.publish([message(f"filler {n}" + 3000 * "x", "other")])
        except PublishError as error:
            refused = str(error)
            break
    say(refused)
    consumer.settle(ACK, *tags)
    consumer.save(("kept", "SUCCESS", meta_of("kept"), "", 1))
    consumer.publish((2, message("refused", "other")))
    consumer.record.wait(lambda: bool(consumer.record.refused))
    say(consumer.record.refused[0][1], consumer.record.stored)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    consumer.stored(1)
    consumer.allow(20)
    consumer.rows(40)
    publisher.publish([message("after", "other")])
    say(n, publisher.depth("other"))
"""


def test_a_full_disk_refuses_publishes_and_loses_nothing(
    path: Path, other_process: Callable[[str], OtherProcess]
) -> None:
    process = other_process(FULL_DISK.replace("PATH", repr(str(path))))
    (refused,) = process.hear()
    assert refused.startswith(f"not published: {path} cannot be written")
    assert "Free space" in refused
    reason, stored = process.hear()
    assert "Free space" in reason
    assert stored == []
    accepted, depth = process.hear()
    assert depth == accepted + 1
    process.go_on()
    assert rows_of(
        path, "SELECT count(*) FROM messages WHERE queue = (SELECT id FROM queues WHERE name = 'celery')"
    ) == [(20,)]
    assert rows_of(path, "SELECT id FROM results WHERE id = 'kept'") == [("kept",)]


def test_a_lock_that_is_held_too_long_refuses_a_publish_and_only_delays_a_worker(
    publisher: Publisher, consumer: Consuming, path: Path
) -> None:
    publisher.publish([message(1)])
    tag = consumer.rows(1)[0][0]
    connection = sqlite3.connect(path, isolation_level=None, timeout=TIMEOUT_S)
    connection.execute("BEGIN IMMEDIATE")
    consumer.settle(ACK, tag)
    began = time.monotonic()
    with pytest.raises(PublishError, match="locked by another program"):
        publisher.publish([message(2)])
    assert 1.9 < time.monotonic() - began < 5.0
    connection.execute("COMMIT")
    connection.close()
    publisher.publish([message(3)])
    assert consumer.bodies(2) == [b"1", b"3"]
    consumer.fence()
    assert rows_of(path, "SELECT body FROM messages") == [(b"3",)]


# --- parts ------------------------------------------------------------------------------------------------------------


def test_results_survive_packing_and_unpacking() -> None:
    small, large = ("one", b"x" * 10), ("two", b"y" * (bells.MAX_INLINE_BYTES + 1))
    many = [(f"task-{n}", b"z" * 1000) for n in range(200)]
    datagrams = list(bells.pack_results([small, large, *many]))
    assert all(len(datagram) <= bells.MAX_DATAGRAM_BYTES for datagram in datagrams)
    unpacked = [record for datagram in datagrams for record in bells.unpack_results(datagram)]
    assert unpacked == [small, ("two", None), *many]


def test_false_datagrams_yield_what_is_whole() -> None:
    (datagram,) = bells.pack_results([("one", b"first"), ("two", b"second")])
    for size in range(len(datagram)):
        assert list(bells.unpack_results(datagram[:size])) in ([], [("one", b"first")])
    assert list(bells.unpack_results(datagram + b"\x00")) == [("one", b"first"), ("two", b"second")]
    assert list(bells.unpack_results(b"\xff" * 50)) == []


def test_a_reply_address_from_a_message_is_never_a_path(consumer: Consuming, tmp_path: Path) -> None:
    for address in (
        "../../etc/passwd",
        "c-1-0123456789abcdef/../x",
        "w-1-0123456789abcdef",
        "c-1-0123456789abcdef\n",
        "",
    ):
        consumer.save((new_id(), "SUCCESS", b"{}", address, 0))
    consumer.fence()


def test_patience_ends() -> None:
    def locked() -> None:
        raise sqlite3.OperationalError("database is locked")

    began = time.monotonic()
    with pytest.raises(sqlite3.OperationalError):
        database.patiently(locked, 0.1)
    assert 0.1 <= time.monotonic() - began < 1.0


def test_stores_and_consumers_fit_their_protocols(url: str, settings: Settings) -> None:
    store: ResultStore = SqliteStore(url, settings)
    assert store.load("x") is None
    assert SqliteConsumer(url, settings).name.startswith("fastq@")
    store.close()


OTHER = """
import sys
from fastq import FastQ
app = FastQ("other", broker=sys.argv[1])
app.send_task("t", queue="others")
app.close()
"""


def test_what_a_forked_process_sends_is_kept_when_all_others_have_closed_the_file(
    sqlite_url: str, tmp_path: Path
) -> None:
    """SQLite's locks do not come over a fork: a child that believed in its parent's would lose what it writes."""
    app = FastQ("forks", broker=sqlite_url)
    app.send_task("t")
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            app.send_task("t")
            theirs.send(b".")
            theirs.recv(1)
            for _ in range(10):
                app.send_task("t")
            code = 0
        finally:
            os._exit(code)
    assert ours.recv(1) == b"."
    app.close()
    subprocess.run([sys.executable, "-c", OTHER, sqlite_url], check=True, cwd=ROOT, timeout=60)
    ours.send(b".")
    assert os.waitpid(pid, 0)[1] == 0
    publisher = open_publisher(sqlite_url, Settings())
    assert publisher.depth("celery") == 12
    publisher.close()
    ours.close()
    theirs.close()


def test_a_process_that_is_forked_while_a_thread_writes_is_not_locked_out(sqlite_url: str) -> None:
    publisher = open_publisher(sqlite_url, Settings({"fastq_publish_timeout": 5.0}))
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            publisher.publish([message(b"1")])

    thread = threading.Thread(target=write)
    thread.start()
    try:
        answers = [in_child(lambda: publisher.publish([message(b"2")])) for _ in range(5)]
    finally:
        done.set()
        thread.join()
    assert answers == ["returned None"] * 5
    publisher.close()
