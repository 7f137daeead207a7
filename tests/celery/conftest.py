"""Stages for the tests of this folder. `pytest tests/celery -k under_celery` runs the reference alone.

Every test is parametrized over the runner: `under_celery` says what stock Celery does, `under_fastq` that fastq does
the same. A module's tests share the workers of a stage, as starting one takes longer than most tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import celery
import pytest
from celery import _state
from kombu.serialization import registry

from tests.celery.stage import BackendKind, BrokerKind, CeleryStage, Servers, opened
from tests.support.worker_process import Program

RUNNERS: tuple[Program, ...] = ("celery", "fastq")

#: Files of which a run takes long: not run on the older versions of Celery that we claim, but for those tests in them
#: that are marked with ``versions``.
SLOW_FILES = (
    *("test_accelerate", "test_acks", "test_commands", "test_events", "test_examples", "test_flower"),
    *("test_frameworks", "test_hookpoints", "test_leases", "test_mixed", "test_options", "test_patch", "test_strikes"),
    "test_wire",
)

OpenStage = Callable[..., CeleryStage]


def stages(*kinds: tuple[BrokerKind, BackendKind], runners: Sequence[Program] = RUNNERS) -> list[Any]:
    """Return the parameters for stages of these kinds under each runner."""
    return [
        pytest.param((runner, broker, backend), id=f"under_{runner}-{broker}-{backend}", marks=_marks(broker, backend))
        for runner in runners
        for broker, backend in kinds
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is run on older versions of Celery too, and skip what the installed one is too old for."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.stem not in SLOW_FILES:
            item.add_marker(pytest.mark.versions)
        for since in item.iter_markers("since"):
            version, why = since.args
            if celery.VERSION[:2] < tuple(map(int, version.split("."))):
                item.add_marker(pytest.mark.skip(reason=f"before Celery {version} {why}"))


def _marks(broker: BrokerKind, backend: BackendKind) -> list[pytest.MarkDecorator]:
    servers = {"rabbitmq" if broker == "amqp" else "redis", *(["redis"] if backend == "redis" else [])}
    return [getattr(pytest.mark, name) for name in sorted(servers)]


@pytest.fixture(autouse=True, scope="module")
def no_task_leaks() -> Iterator[None]:
    """Celery gives the tasks of every application to those that come later; not beyond a test file.

    Those of ``proj`` stay: its modules are imported once, and every stage's client knows its tasks.
    """
    before = set(_state._on_app_finalizers)
    yield
    shared = {each for each in _state._on_app_finalizers if _is_of_proj(each)}
    _state._on_app_finalizers.clear()
    _state._on_app_finalizers.update(before | shared)


@pytest.fixture
def own_serializers() -> Iterator[None]:
    """Let a test change what kombu takes and sends by default (`app.setup_security()`) for itself alone."""
    before = {name: value.copy() if hasattr(value, "copy") else value for name, value in vars(registry).items()}
    yield
    vars(registry).update(before)


def _is_of_proj(finalizer: Callable[..., object]) -> bool:
    inside = [cell.cell_contents for cell in finalizer.__closure__ or ()]
    return any(str(getattr(each, "__module__", "")).startswith("tests.celery.proj") for each in inside)


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Servers:
    """The session's servers, each started when it is first needed."""
    return Servers(
        rabbitmq=lambda: request.getfixturevalue("rabbitmq"),
        redis=lambda: request.getfixturevalue("redis_server"),
    )


@pytest.fixture
def open_stage(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenStage]:
    """A function (runner, broker, backend, **settings) that returns a stage without workers; closed after the test."""
    with contextlib.ExitStack() as closing:
        yield lambda *kind, **settings: closing.enter_context(opened(servers, tmp_path_factory, *kind, **settings))
