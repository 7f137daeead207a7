"""The state STARTED of the tasks that track it, for those who wait. Stores nothing: it hands the state to an outlet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fastq.codecs.meta import encode_meta
from fastq.states import STARTED
from fastq.steps import Before, Step


class Trackable(Protocol):
    """What this step needs of a task."""

    track_started: bool | None


class Outlet(Protocol):
    """Where states go."""

    def state(self, task_id: str, state: str, meta: bytes) -> None:
        """Have a state stored."""


class Started(Step):
    """Tells by which process and node a call runs. ``default`` is for tasks that say nothing."""

    #: Set in the process that runs the calls.
    outlet: Outlet

    def __init__(self, hostname: str, default: bool) -> None:
        self._hostname = hostname
        self._default = default

    def before(self, task: Trackable) -> Before | None:
        """Return what tells, for tasks that track it."""
        tracks = self._default if task.track_started is None else task.track_started
        return self._tell if tracks else None

    def _tell(self, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        meta = encode_meta(task_id, STARTED, {"pid": os.getpid(), "hostname": self._hostname})
        self.outlet.state(task_id, STARTED, meta)
