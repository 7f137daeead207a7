"""One worker for all tests of a row that leave it as it was, and one of its own for each that does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import missing
from tests.support.kinds import ROWS, SOME_ROWS, Field, Row, open_field
from tests.support.servers import PostgreSQL, ServerMissing


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run for every row what asks for a field and does not say for which."""
    if "row" in metafunc.fixturenames and not any(
        mark.name == "parametrize" and mark.args[0] == "row" for mark in metafunc.definition.iter_markers()
    ):
        # Tests that share a worker cost little.
        chosen = ROWS if "shared" in metafunc.fixturenames else SOME_ROWS
        metafunc.parametrize("row", chosen, ids=str, scope="module")


@pytest.fixture
def field(row: Row, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Field]:
    """The row's place, without a worker."""
    opened = open_field(row, request, tmp_path)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def shared(row: Row, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """The row's place with a worker of the default settings, for all tests of a file."""
    opened = open_field(row, request, tmp_path_factory.mktemp(str(row)))
    opened.start()
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A private PostgreSQL."""
    try:
        server = PostgreSQL()
    except ServerMissing as error:
        missing(error)
        raise
    try:
        yield server.start()
    finally:
        server.close()
