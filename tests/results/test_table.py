"""Finding the result store that a URL names, and the one that stores nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastq.errors import ResultsDisabled, SettingsError
from fastq.results import STORES, find_store, open_store
from fastq.results.disabled import DisabledStore
from fastq.settings import Settings


def test_every_store_can_be_found_but_imports_only_itself(tmp_path: object) -> None:
    settings = Settings({"broker_url": "amqp://", "result_backend_transport_options": {"master_name": "mymaster"}})
    settings.freeze()
    urls = {
        "sqlite": f"sqlite:///{tmp_path}/x.db",
        "memory": "memory://results",
        "disabled": "disabled",
        "rpc": "rpc://",
        **{scheme: f"{scheme}://host" for scheme in ("redis", "rediss", "sentinel")},
        **{scheme: f"{scheme}:///run/redis" for scheme in ("redis+socket", "redis+unix", "unix", "socket")},
    }
    assert urls.keys() == {scheme for kind in STORES for scheme in kind.schemes}
    for url in urls.values():
        store = open_store(url, settings)
        assert str(find_store(url).store).endswith(f":{type(store).__name__}")
        store.close()


def test_an_unknown_store_names_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"carrier://.*sqlite://, memory://, disabled, rpc://"):
        open_store("carrier://pigeon:secret@coop", Settings())


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: store.load("some-task"),
        lambda store: store.wait("some-task", 1.0),
        lambda store: store.watch("some-task", print),
        lambda store: store.save("some-task", "SUCCESS", b"{}"),
        lambda store: store.forget("some-task"),
    ],
)
def test_asking_for_a_result_that_nobody_stores_names_the_remedy(ask: Callable[[DisabledStore], object]) -> None:
    with pytest.raises(ResultsDisabled, match=r"some-task.*backend="):
        ask(DisabledStore())


def test_messages_can_be_sent_without_a_store() -> None:
    store = DisabledStore()
    assert store.reply_address() is None  # type: ignore[func-returns-value]
    store.close()
