"""django-celery-results: the rows that the worker leaves in the database are the same."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

import pytest

from tests.celery.tools.tool import Tool

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]

COLUMNS = "task_name, task_args, task_kwargs, status, result, traceback, content_type, content_encoding, meta, worker"


ERROR = '{"exc_type": "ValueError", "exc_message": ["order 7 has no items"], "exc_module": "builtins"}'
EXPECTED = [
    ("add", '"(5, 5)"', '"{}"', "SUCCESS", "10", None, 0),
    ("add", '"(6, 6)"', '"{}"', "SUCCESS", "12", None, 0),
    ("add", '"(1, 1)"', '"{}"', "SUCCESS", "2", None, 0),
    ("add", '"(2, 2)"', '"{}"', "SUCCESS", "4", None, 0),
    ("add", '"(2, 3)"', '"{}"', "SUCCESS", "5", None, 0),
    ("crash", '"()"', "\"{'order': 7}\"", "FAILURE", ERROR, "ValueError: order 7 has no items", 0),
    ("flaky", '"()"', '"{}"', "SUCCESS", '"second time"', None, 0),
    ("progress", '"()"', '"{}"', "SUCCESS", "null", None, 0),
    ("total", '"([2, 4],)"', '"{}"', "SUCCESS", "6", None, 0),
]


def rows(tool: Tool, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(tool.folder / "site.db", timeout=20) as database:
        found = database.execute(query).fetchall()
    database.close()
    return found


def described(row: tuple[Any, ...]) -> tuple[Any, ...]:
    name, args, kwargs, status, result, traceback, content_type, encoding, meta, worker = row
    last_line = traceback.splitlines()[-1] if traceback else None
    children = len(json.loads(meta)["children"])
    assert (content_type, encoding) == ("application/json", "utf-8")
    assert "@" in worker
    return name, args, kwargs, status, result, last_line, children


def test_the_rows_are_the_same(tool: Tool) -> None:
    tool.client("django_site", "migrate")
    worker = tool.worker("django_site")
    values = tool.client("django_site", "call")
    assert worker.stop() == 0
    assert values == ["5", "order 7 has no items", "second time", "None", "6", "[10, 12]", [10, 12]]
    assert (tool.folder / "seen").read_text(encoding="utf-8") == "PROGRESS"

    found = rows(tool, f"SELECT {COLUMNS} FROM django_celery_results_taskresult ORDER BY task_name, result")
    assert [described(row) for row in found] == EXPECTED
    dates = "date_created <= date_done AND date_started IS NOT NULL"
    assert rows(tool, f"SELECT count(*) FROM django_celery_results_taskresult WHERE {dates}") == [(len(EXPECTED),)]
    assert rows(tool, "SELECT count(*) FROM django_celery_results_chordcounter") == [(0,)]
    assert rows(tool, "SELECT count(*) FROM django_celery_results_groupresult") == [(1,)]
