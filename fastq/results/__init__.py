"""Result stores: where finished tasks' results are kept. Finds the one that a URL names; imports no other."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

from fastq.errors import SettingsError

if TYPE_CHECKING:
    from fastq.interfaces import Publisher, ResultStore
    from fastq.settings import Settings

_REDIS: Final = "fastq.results.redis:RedisStore"

#: What makes a store, by the scheme of the URL.
STORES: Final = {
    "sqlite": "fastq.results.sqlite:SqliteStore",
    "memory": "fastq.results.memory:MemoryStore",
    "disabled": "fastq.results.disabled:DisabledStore",
    "rpc": "fastq.results.rpc:RpcStore",
    **dict.fromkeys(("redis", "rediss", "sentinel", "redis+socket", "redis+unix", "unix", "socket"), _REDIS),
}


def open_store(url: str, settings: Settings, publisher: Publisher | None = None) -> ResultStore:
    """Return the result store that ``result_backend`` names; it connects at its first use. Raises SettingsError."""
    scheme = url.partition(":")[0].lower()
    target = STORES.get(scheme)
    if target is None:
        known = ", ".join(name if name == "disabled" else f"{name}://" for name in STORES)
        raise SettingsError(f"no result store is known for {scheme}://; set result_backend to one of {known}")
    module, _, name = target.partition(":")
    store = getattr(import_module(module), name)
    # Replies go to whatever broker the settings name; the other stores are somewhere of their own.
    made: ResultStore = store(settings) if scheme == "rpc" else store(url, settings)
    return made
