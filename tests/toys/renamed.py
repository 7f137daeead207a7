"""SQLite under another name: a broker and a store that the package knows nothing of."""

from __future__ import annotations

from fastq._core import Core
from fastq.brokers import Broker
from fastq.brokers.sqlite.broker import SqliteConsumer, SqlitePublisher
from fastq.results import Store
from fastq.results.sqlite.store import SqliteStore
from fastq.settings import Settings


def as_sqlite(url: str) -> str:
    return f"sqlite{url[url.index('://') :]}"


def consumer(url: str, settings: Settings, core: Core | None) -> SqliteConsumer:
    return SqliteConsumer(as_sqlite(url), settings, core)


BROKER = Broker(
    schemes=("renamed",),
    publisher=lambda url, settings: SqlitePublisher(as_sqlite(url), settings),
    consumer="tests.toys.renamed:consumer",
    options=frozenset({"speed"}),
)
STORE = Store(
    schemes=("renamed",),
    store=lambda url, settings: SqliteStore(as_sqlite(url), settings),
    saver=consumer,
)
