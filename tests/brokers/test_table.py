"""Finding what a URL names, and what is said of one that names nothing: misspelt, no URL at all, or broken."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastq.brokers import find_broker, open_publisher
from fastq.errors import SettingsError
from fastq.results import find_store
from fastq.settings import Settings

Find = Callable[[str], object]

BOTH = pytest.mark.parametrize(("find", "setting"), [(find_broker, "broker_url"), (find_store, "result_backend")])


@pytest.fixture(autouse=True)
def plain_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules that the tests write go, with what was imported of them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("toy_"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("scheme", "meant"),
    [
        ("ampq", "amqp"), ("amqp+ssl", "amqps"), ("rabbitmq", "amqp"), ("rdis", "redis"), ("redis+ssl", "rediss"),
        ("redis+sentinel", "sentinel"), ("sqla+sqlite", "sqlite"), ("db+sqlite", "sqlite"), ("sqlite3", "sqlite"),
        ("redis+sock", "redis+socket"), ("in-memory", "memory"),
    ],
)  # fmt: skip
def test_a_misspelt_scheme_is_told_what_was_meant(scheme: str, meant: str) -> None:
    with pytest.raises(SettingsError, match=rf"no broker is known for .*; did you mean {meant.replace('+', '.')}://\?"):
        find_broker(f"{scheme}://user:sesame@host/1")


@pytest.mark.parametrize("scheme", ["sqs", "confluentkafka", "zookeeper"])
def test_a_scheme_that_is_like_no_other_is_told_the_known_ones(scheme: str) -> None:
    with pytest.raises(SettingsError, match=r"Set broker_url to one of amqp://, .*memory://") as caught:
        find_broker(f"{scheme}://")
    assert "did you mean" not in str(caught.value)


@BOTH
@pytest.mark.parametrize(
    "text",
    [
        "guest:sesame@localhost/v", "redis:/localhost:sesame@x", "amqp:guest:sesame@localhost",
        "amqp//guest:sesame@localhost", "//guest:sesame@localhost", "redis;//:sesame@x", ":sesame@localhost",
    ],
)  # fmt: skip
def test_what_is_no_url_is_imported_by_nobody_and_shows_no_password(find: Find, setting: str, text: str) -> None:
    before = set(sys.modules)
    with pytest.raises(SettingsError, match=f"{setting} .* is no URL") as caught:
        find(text)
    assert "sesame" not in str(caught.value)
    assert not {"guest", "redis", "amqp"} & (set(sys.modules) - before)


@BOTH
def test_a_host_alone_is_no_url(find: Find, setting: str) -> None:
    for text in ("localhost", "localhost:5672", "10.0.0.1:6379/0"):
        with pytest.raises(SettingsError, match=f"{setting} '{text}' is no URL"):
            find(text)


@BOTH
@pytest.mark.parametrize(
    ("source", "name", "problem"),
    [
        (None, "toy_absent:PART", "No module named 'toy_absent'"),
        ("import nothing_of_that_name", "toy_part:PART", "No module named 'nothing_of_that_name'"),
        ("1 / 0", "toy_part:PART", "ZeroDivisionError: division by zero"),
        ("def (", "toy_part:PART", "SyntaxError: "),
        ("", "toy_part:PART", "has no attribute 'PART'"),
        ("PART = 'text'", "toy_part:PART", "is a str; expected a fastq"),
    ],
)
def test_a_part_that_cannot_be_had_says_why(
    find: Find, setting: str, source: str | None, name: str, problem: str, tmp_path: Path
) -> None:
    if source is not None:
        (tmp_path / "toy_part.py").write_text(source)
    with pytest.raises(SettingsError) as caught:
        find(f"{name}://user:sesame@place")
    assert name in str(caught.value)
    assert problem in str(caught.value)
    assert "sesame" not in str(caught.value)


def test_a_broker_whose_publisher_is_not_there_says_so(tmp_path: Path) -> None:
    (tmp_path / "toy_part.py").write_text(
        "from fastq.brokers import Broker\nPART = Broker(('toy',), 'toy_part:Gone', 'toy_part:Gone')\n"
    )
    with pytest.raises(SettingsError, match="'toy_part:Gone' cannot be imported"):
        open_publisher("toy_part:PART://", Settings())


def test_a_store_that_is_switched_off_may_be_written_as_a_url() -> None:
    for text in ("disabled", "disabled://", "DISABLED"):
        settings = Settings({"broker_url": "amqp://", "result_backend": text})
        settings.freeze()
        assert settings.result_backend == "disabled"


def test_the_store_of_an_embedded_broker_is_its_own_however_it_is_spelt() -> None:
    for url in ("SQLite:///x.db", "Memory://x"):
        settings = Settings({"broker_url": url})
        settings.freeze()
        assert settings.result_backend == url
