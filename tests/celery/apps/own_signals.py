"""A Celery application that sets handlers of its own in the main process. OWN_SIGNALS: what its SIGTERM one does."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from celery.signals import worker_init, worker_ready

from tests.celery.proj.app import make_app
from tests.celery.proj.journal import note

app = make_app({**json.loads(os.environ.get("PROJ_SETTINGS", "{}")), "include": ()})


def on_signal(signum: int, frame: object) -> None:
    note("signal", number=signum)


@worker_init.connect
def begin(**_: Any) -> None:
    for number in (signal.SIGUSR2, signal.SIGWINCH):
        signal.signal(number, on_signal)


@worker_ready.connect
def ready(**_: Any) -> None:
    def on_term(signum: int, frame: object) -> None:
        note("signal", number=signum)
        if os.environ["OWN_SIGNALS"] == "calls the old one":
            old(signum, frame)  # type: ignore[operator, misc]

    old = signal.signal(signal.SIGTERM, on_term)
