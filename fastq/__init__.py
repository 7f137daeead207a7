"""fastq: a task queue with a compiled core that speaks Celery's words and wire format.

The public names; each is imported from its module when it is first used, so that ``import fastq`` costs next to
nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from fastq.version import __version__

if TYPE_CHECKING:
    from fastq import states
    from fastq.app import FastQ, current_app
    from fastq.celery.cli.patch import patch
    from fastq.celery.sending.accelerate import accelerate
    from fastq.errors import (
        ConnectionLost,
        EncodeError,
        FastqError,
        Ignore,
        MaxRetriesExceeded,
        NotRegistered,
        PublishError,
        Reject,
        RemoteError,
        ResultsDisabled,
        ResultTimeout,
        Retry,
        SettingsError,
        SoftTimeLimitExceeded,
        TaskError,
        TaskRevoked,
        TimeLimitExceeded,
        WorkerLostError,
    )
    from fastq.request import Request
    from fastq.result import AsyncResult, EagerResult, Progress
    from fastq.shared import current_task, shared_task
    from fastq.steps import Step
    from fastq.task import Task, get_task_logger

if not any(name.startswith("_core.") and name.endswith(".so") for name in os.listdir(os.path.dirname(__file__))):
    # The folder of a clone goes before an installed package for every program that is started in it.
    raise ImportError(
        f"{os.path.dirname(__file__)} is fastq's source, not built: start Python in another folder to use the "
        "installed fastq, or build this one with ./ci/quickstart"
    )

__all__ = [
    "AsyncResult",
    "ConnectionLost",
    "EagerResult",
    "EncodeError",
    "FastQ",
    "FastqError",
    "Ignore",
    "MaxRetriesExceeded",
    "NotRegistered",
    "Progress",
    "PublishError",
    "Reject",
    "RemoteError",
    "Request",
    "ResultTimeout",
    "ResultsDisabled",
    "Retry",
    "SettingsError",
    "SoftTimeLimitExceeded",
    "Step",
    "Task",
    "TaskError",
    "TaskRevoked",
    "TimeLimitExceeded",
    "WorkerLostError",
    "__version__",
    "accelerate",
    "current_app",
    "current_task",
    "get_task_logger",
    "patch",
    "shared_task",
    "states",
]

_MODULES = {
    "AsyncResult": "fastq.result",
    "EagerResult": "fastq.result",
    "FastQ": "fastq.app",
    "Progress": "fastq.result",
    "Request": "fastq.request",
    "Step": "fastq.steps",
    "Task": "fastq.task",
    "accelerate": "fastq.celery.sending.accelerate",
    "current_app": "fastq.app",
    "current_task": "fastq.shared",
    "get_task_logger": "fastq.task",
    "patch": "fastq.celery.cli.patch",
    "shared_task": "fastq.shared",
}


def __getattr__(name: str) -> Any:
    if name == "states":
        return importlib.import_module("fastq.states")
    if name not in __all__:
        words = None
        if not name.startswith("_"):
            absent = importlib.import_module("fastq.sending.absent")
            words = absent.absent("module 'fastq' has no", name, absent.NAMES)
        # `from fastq import name` asks like this first; an AttributeError's words would not be seen.
        if words is not None and sys._getframe(1).f_code.co_name == "_handle_fromlist":
            raise ImportError(words, name=__name__, path=__file__)
        raise AttributeError(words or f"module 'fastq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES.get(name, "fastq.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
