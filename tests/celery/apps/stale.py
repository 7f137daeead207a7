"""An application whose result store fails the first who uses it after a while, and a fix-up as Celery's for Django.

STALE_FILE  where what happens is written, a word a line
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from celery import Celery
from celery.backends.base import BaseBackend


def note(word: str) -> None:
    with open(os.environ["STALE_FILE"], "a", encoding="utf-8") as file:
        file.write(f"{word}\n")


class Store(BaseBackend):  # type: ignore[misc]
    """Fails once in each process."""

    has_failed = False

    def _store_result(self, task_id: str, result: Any, state: str, *args: Any, **options: Any) -> Any:
        note(state)
        if not self.has_failed:
            self.has_failed = True
            raise ConnectionError("server closed the connection unexpectedly")
        return result

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        return {"status": "PENDING", "result": None}


app = Celery("stale", broker=os.environ["STALE_BROKER"], backend=f"{__name__}:Store")
app._fixups.append(SimpleNamespace(worker_fixup=SimpleNamespace(close_database=lambda: note("close"))))


@app.task(name="killed")
def killed() -> None:
    os.kill(os.getpid(), 9)
