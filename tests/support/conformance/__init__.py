"""What every implementation of a seam must do, whatever is behind it: one suite for each protocol of ``interfaces``.

A test file derives a class from a suite and provides its fixtures; ``url`` names a fresh broker or store. Where
brokers may differ, a suite has an attribute that says how, and tests it either way: nothing is switched off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, Final

import pytest

from fastq.wire.ids import new_id
from fastq.wire.message import Message, encode_task

pytest.register_assert_rewrite(
    *(
        f"{__name__}.{suite}"
        for suite in ("async_publishers", "buses", "consumers", "leases", "pools", "publishers", "savers", "stores")
    )
)

TIMEOUT_S: Final = 10.0


def message(body: object, queue: str = "celery", **options: Any) -> Message:
    """Return a task message whose body is a text of the test's choice."""
    return encode_task("tests.task", new_id(), str(body).encode(), routing_key=queue, **options)


def meta_of(task_id: str, state: str = "SUCCESS", result: object = None) -> bytes:
    return json.dumps(
        {"task_id": task_id, "status": state, "result": result, "traceback": None, "children": []}
    ).encode()


def in_child(work: Callable[[], object]) -> str:
    """Fork, work in the child, and return what it returned or raised, as text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, f"returned {work()!r}".encode())
        except BaseException as error:
            os.write(writer, f"raised {type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(pid, 0)
    return text
