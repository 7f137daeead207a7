"""Result stores: where finished tasks' results are kept. One table says what stands behind a URL; imports no store.

A store of somebody else's is a ``Store`` too: named by ``module:NAME`` in place of a scheme, as in
``mystore:STORE://place``, or by an entry point of the group ``fastq.result_stores``, whose name is the scheme.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fastq.brokers import REDIS as REDIS_BROKER
from fastq.brokers import try_broker
from fastq.errors import SettingsError
from fastq.net.urls import mask_url, scheme_of, split_urls
from fastq.plugins import Target, find_plugin, load, plugin_names, unknown_part

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.interfaces import ResultStore, Saver
    from fastq.settings import Settings

#: The group of entry points in which other packages name their stores.
ENTRY_POINTS: Final = "fastq.result_stores"


@dataclass(frozen=True, slots=True)
class Store:
    """What stands behind the schemes of one kind of store. Targets are objects, or where they are (``module:name``).

    ``store`` is the caller's half and called with (url, settings), ``saver`` the worker's, with (url, settings, core):
    see ``interfaces``. None: a worker does not store by itself there.
    """

    schemes: tuple[str, ...]
    store: Target
    saver: Target | None = None
    #: Whether results are sent to whoever asked, by the worker's own broker.
    replies: bool = False
    #: Whether what is stored is there for whoever knows the task's id.
    keeps: bool = True


SQLITE: Final = Store(
    schemes=("sqlite",),
    store="fastq.results.sqlite.store:SqliteStore",
    saver="fastq.brokers.sqlite.broker:SqliteConsumer",
)
MEMORY: Final = Store(
    schemes=("memory",),
    store="fastq.results.memory:MemoryStore",
    saver="fastq.brokers.memory.broker:MemoryConsumer",
)
REDIS: Final = Store(
    schemes=REDIS_BROKER.schemes,
    store="fastq.results.redis.store:RedisStore",
    saver="fastq.results.redis.saver:RedisSaver",
)
RPC: Final = Store(schemes=("rpc",), store="fastq.results.rpc:RpcStore", replies=True, keeps=False)
DISABLED: Final = Store(schemes=("disabled",), store="fastq.results.disabled:DisabledStore", keeps=False)

#: Every kind of store that is built in.
STORES: Final = (SQLITE, MEMORY, DISABLED, RPC, REDIS)
_OF_SCHEME: Final = {scheme: store for store in STORES for scheme in store.schemes}


def find_store(url: str) -> Store:
    """Return what stands behind a URL, or the first of several. Raises SettingsError for a scheme that is not known."""
    scheme = scheme_of(url)
    found = _OF_SCHEME.get(scheme) or find_plugin(ENTRY_POINTS, scheme, Store)
    if found is None:
        masked = mask_url(next(iter(split_urls(url)), ""))
        known = [*_OF_SCHEME, *plugin_names(ENTRY_POINTS)]
        raise unknown_part(scheme, masked, "results cannot be stored at", "result_backend", known)
    return found


def fitting_backend(broker_url: str) -> str:
    """Return the ``result_backend`` to name to who has none that goes with that broker; without a password."""
    broker = try_broker(broker_url)
    if broker is not None and broker.speaks_amqp:
        return "rpc://"
    masked = mask_url(broker_url)
    return masked if scheme_of(broker_url) in _OF_SCHEME else "sqlite:///results.db"


def open_store(url: str, settings: Settings) -> ResultStore:
    """Return the result store that ``result_backend`` names; it connects at its first use. Raises SettingsError."""
    store: ResultStore = load(find_store(url).store)(url, settings)
    return store


def open_saver(url: str, settings: Settings, core: Core | None) -> Saver:
    """Return what stores a worker's results where a URL says; ``open`` connects it. Raises SettingsError."""
    target = find_store(url).saver
    if target is None:
        known = ", ".join(["rpc://", *(f"{name}://" for name, each in _OF_SCHEME.items() if each.saver), "disabled"])
        raise SettingsError(f"results cannot be stored at {scheme_of(url)}://; set result_backend to one of {known}")
    saver: Saver = load(target)(url, settings, core)
    return saver
