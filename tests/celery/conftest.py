"""Stages for the tests of this folder. `pytest tests/celery -k under_celery` runs the reference alone.

Every test is parametrized over the runner: `under_celery` says what stock Celery does, `under_fastq` that fastq does
the same. A module's tests share the workers of a stage, as starting one takes longer than most tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import celery
import pytest
from celery import _state
from kombu.serialization import registry

from tests.celery.stage import BackendKind, BrokerKind, CeleryStage, Servers, opened
from tests.workers import Program

RUNNERS: tuple[Program, ...] = ("celery", "fastq")

#: Tests of what Celery itself does since a version; fastq runs on Celery's own code there.
SINCE: dict[str, tuple[int, int]] = {
    "test_reject_without_requeue_is_a_failure": (5, 7),
    "test_the_request_has_every_field": (5, 7),
    "test_options_of_a_call_arrive_in_its_request": (5, 7),
    "test_the_main_process_runs_the_handlers_of_a_call_that_its_hard_limit_ended": (5, 7),
    "test_pydantic_models_are_checked_and_built": (5, 7),
    "test_wrong_input_for_a_pydantic_model_is_a_failure": (5, 6),
}

OpenStage = Callable[..., CeleryStage]


def stages(*kinds: tuple[BrokerKind, BackendKind]) -> list[Any]:
    """Return the parameters for stages of these kinds under each runner."""
    return [
        pytest.param((runner, broker, backend), id=f"under_{runner}-{broker}-{backend}", marks=_marks(broker, backend))
        for runner in RUNNERS
        for broker, backend in kinds
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the installed Celery is too old for."""
    for item in items:
        since = SINCE.get(getattr(item, "originalname", item.name), (0, 0))
        if celery.VERSION[:2] < since:
            item.add_marker(pytest.mark.skip(reason=f"so since Celery {since[0]}.{since[1]}"))


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
