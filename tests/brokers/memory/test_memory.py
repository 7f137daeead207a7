"""memory://: what is particular to living in one process."""

from __future__ import annotations

import uuid

import pytest

from fastq.brokers import open_publisher
from fastq.errors import SettingsError
from fastq.results import open_store
from fastq.settings import Settings
from tests.support.conformance import (
    in_child,
    message,
    meta_of,
)
from tests.support.consumer_in_thread import REJECT, Consuming


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4()}"


@pytest.fixture
def settings() -> Settings:
    settings = Settings({"result_expires": 3600.0})
    settings.freeze()
    return settings


def test_names_are_apart(settings: Settings) -> None:
    one, other = open_publisher("memory://one-name", settings), open_publisher("memory://other-name", settings)
    one.publish([message(1)])
    assert (one.depth("celery"), other.depth("celery")) == (1, 0)
    one.purge("celery")


def test_a_forked_process_is_told_that_it_is_alone(url: str, settings: Settings) -> None:
    publisher, store = open_publisher(url, settings), open_store(url, settings)
    publisher.publish([message(1)])
    assert in_child(lambda: publisher.publish([message(2)])).startswith("raised PublishError: not published: memory://")
    assert "sqlite://" in in_child(lambda: store.load("x"))
    assert publisher.depth("celery") == 1


def test_expired_results_are_dropped(url: str) -> None:
    settings = Settings({"result_expires": 0.0})
    store = open_store(url, settings)
    store.save("old", "SUCCESS", meta_of("old"))
    store.save("new", "SUCCESS", meta_of("new"))
    assert store.load("old") is None


def test_rejected_messages_are_kept_as_dead_letters(url: str, settings: Settings) -> None:
    from fastq.brokers.memory.space import find_space

    open_publisher(url, settings).publish([message("bad")])
    with Consuming(url, settings) as consumer:
        consumer.settle(REJECT, consumer.rows(1)[0][0])
    ((held, reason),) = find_space(url).dead
    assert (held.body, reason) == (b"bad", "rejected")


@pytest.mark.parametrize("opened", [open_publisher, open_store])
def test_an_unknown_scheme_names_the_known_ones(opened: object, settings: Settings) -> None:
    with pytest.raises(SettingsError, match="memory://"):
        opened("carrier-pigeon://coop", settings)  # type: ignore[operator]
