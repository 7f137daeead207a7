"""An application as the worker sees it: settings, tasks, what a child does, what the main process tells others.

``FastQProgram`` is the one for a FastQ application; the bridge has one for Celery applications. No loop, no processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from fastq.app import FastQ
from fastq.errors import SettingsError
from fastq.net.urls import mask_url
from fastq.pool import ChildSpec, CompanionMain
from fastq.running.application import FastQChild
from fastq.running.birth import ChildOptions
from fastq.running.child import ChildProcess
from fastq.settings import Settings
from fastq.worker.options import NODE_NAME
from fastq.worker.place import Origin, place_of

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future

    from fastq._child import TaskRules
    from fastq.worker.hooks import Hooks
    from fastq.worker.options import WorkerOptions


class Program(Protocol):
    """What a worker runs."""

    #: The application itself, of either kind.
    app: Any
    #: The first part of a node name that none was given for.
    node: str
    #: What the titles of the worker's processes begin with.
    process_title: str
    #: Whether replies (rpc) go to senders that gave no address too, into a queue of the task's own.
    answers_all: bool

    @property
    def settings(self) -> Settings:
        """Return the settings."""

    @property
    def results(self) -> str:
        """Return where the worker itself stores results: a URL, "rpc://", or "disabled" (nowhere, or in the child)."""

    @property
    def shown_results(self) -> str:
        """Return where results are, for people: secrets masked."""

    def configuration(self, with_defaults: bool) -> dict[str, Any]:
        """Return the settings that were changed, or all, without secrets; every value has a JSON form."""

    def report(self) -> str:
        """Return what a bug report should say of this installation."""

    @property
    def commands(self) -> Mapping[str, Callable[..., Any]]:
        """Return the application's own remote control commands, by name."""

    @property
    def registry(self) -> Mapping[str, Any]:
        """Return the task objects by name."""

    def mark_revoked(self, ids: Sequence[str]) -> None:
        """Store the state REVOKED for tasks that have not begun; does not wait."""

    @property
    def title(self) -> str:
        """Return the application's name for the banner."""

    @property
    def names(self) -> Sequence[str]:
        """Return the names of the tasks."""

    @property
    def async_names(self) -> AbstractSet[str]:
        """Return the names of those that are coroutine functions."""

    def adopt(self, options: WorkerOptions, words: Sequence[str]) -> tuple[WorkerOptions, list[str]]:
        """Return the options as this kind of application means them, and the words that are none of its options."""

    def load(self, options: WorkerOptions, overrides: Sequence[str]) -> None:
        """Import the application's task modules; ``overrides`` are settings as ``name=value`` that win."""

    def complete(self, options: WorkerOptions) -> WorkerOptions:
        """Return the options with the files that the settings name where the command line names none."""

    @property
    def process_settings(self) -> Mapping[str, str]:
        """Return "uid", "gid", "umask" and "executable" as the settings want them; what they leave open is empty."""

    def begin(self, options: WorkerOptions) -> None:
        """Tell the application that a worker starts; it may still change its settings. Logging is not set up yet."""

    def setup_logging(self, handler: logging.StreamHandler[Any], options: WorkerOptions) -> None:
        """Have records go to the handler, in the application's format."""

    def prepare(self, options: WorkerOptions) -> WorkerOptions:
        """Get ready for the first fork; return the options with the queues that the application may have changed."""

    def task_rules(self, options: WorkerOptions) -> list[TaskRules]:
        """Return how the calls of each task are to be treated."""

    def child_main(self, options: ChildOptions) -> ChildProcess:
        """Return what runs in each child; all that children share is made here."""

    def child_spec(self, options: WorkerOptions, child: ChildOptions) -> ChildSpec:
        """Return how a spawned child makes what ``child_main`` returns.

        Raises SettingsError where another interpreter cannot import the application.
        """

    @property
    def companion(self) -> CompanionMain | None:
        """Return what runs in a process of its own beside the children, as long as the worker does; None: nothing."""

    def hooks(self, loop: asyncio.AbstractEventLoop) -> Hooks:
        """Return what the message loop asks and reports to."""

    def tell(self, what: str, **details: Any) -> Future[None] | None:
        """Tell the application of an event in the worker's life; return what is done when its handlers are.

        "starting" comes when the worker can be stopped, "connected" with each connection to the broker, "ready" with
        the first one, before any task runs; then "stopping" and "stopped". None: nobody was told.
        """


_UNKNOWN = Origin()


class FastQProgram:
    """A FastQ application. It has no hooks of its own into the main process."""

    node = NODE_NAME
    process_title = "fastq"
    answers_all = False
    companion = None

    def __init__(self, app: FastQ, origin: Origin = _UNKNOWN) -> None:
        self.app = app
        self._origin = origin

    @property
    def settings(self) -> Settings:
        """Return the application's settings."""
        return self.app.conf

    @property
    def results(self) -> str:
        """Return the result store's URL."""
        return self.app.conf.result_backend or "disabled"

    def configuration(self, with_defaults: bool) -> dict[str, Any]:
        """Return the settings without secrets."""
        from fastq.worker.report import configuration  # few workers are ever asked

        return configuration(self.settings, with_defaults)

    def report(self) -> str:
        """Return versions, platform and settings."""
        from fastq.worker.report import report_text

        return report_text(self.settings)

    @property
    def commands(self) -> Mapping[str, Callable[..., Any]]:
        """Return nothing: there is no way to register one."""
        return {}

    @property
    def shown_results(self) -> str:
        """Return the result store's URL without its password."""
        return mask_url(self.results)

    @property
    def registry(self) -> Mapping[str, Any]:
        """Return the task objects by name."""
        return self.app.tasks

    def mark_revoked(self, ids: Sequence[str]) -> None:
        """Leave it to the worker that gets the message: it stores the state when it drops it."""

    @property
    def title(self) -> str:
        """Return the application's name."""
        return self.app.main or "unnamed"

    @property
    def names(self) -> Sequence[str]:
        """Return the names of the tasks."""
        return list(self.app.tasks)

    @property
    def async_names(self) -> AbstractSet[str]:
        """Return the names of those that are coroutine functions."""
        return {name for name, task in self.app.tasks.items() if task.is_async}

    def adopt(self, options: WorkerOptions, words: Sequence[str]) -> tuple[WorkerOptions, list[str]]:
        """Return the options with this kind's node name; the application has none of its own."""
        return options.named(self.node), list(words)

    def load(self, options: WorkerOptions, overrides: Sequence[str]) -> None:
        """Import the modules that the settings name, and settle the application."""
        if overrides:
            raise SettingsError(f"{overrides[0]!r} after the options: settings there are for Celery applications only")
        if options.reliable is not None:
            self.app.conf.fastq_reliable = options.reliable
        if options.disable_prefetch is not None:
            self.app.conf.worker_disable_prefetch = options.disable_prefetch
        self.app.load_tasks()
        self.app.finalize()

    def complete(self, options: WorkerOptions) -> WorkerOptions:
        """Return the options: these settings name no files."""
        return options

    @property
    def process_settings(self) -> Mapping[str, str]:
        """Return nothing: the command line alone says it."""
        return {"uid": "", "gid": "", "umask": "", "executable": ""}

    def begin(self, options: WorkerOptions) -> None:
        """Nobody waits to be told."""

    def setup_logging(self, handler: logging.StreamHandler[Any], options: WorkerOptions) -> None:
        """Have records go to the handler."""
        from fastq.worker.process.log import escape_arguments, setup_logging

        setup_logging(handler, options.loglevel, self.settings, options.color)
        escape_arguments()

    def prepare(self, options: WorkerOptions) -> WorkerOptions:
        """Settle the application."""
        self.app.finalize()
        return options

    def task_rules(self, options: WorkerOptions) -> list[TaskRules]:
        """Return how the calls of each task are to be treated."""
        return [self._options_of(name, bool(options.reliable)) for name in self.app.tasks]

    def _options_of(self, name: str, reliable: bool) -> TaskRules:
        from fastq._child import TaskRules  # after the fork: children have no message loop

        task, settings = self.app.tasks[name], self.settings
        late = settings.task_acks_late if task.acks_late is None else task.acks_late
        return TaskRules(
            name,
            acks_late=reliable if late is None else late,
            requeue_lost=reliable,
            ignore_result=bool(settings.task_ignore_result if task.ignore_result is None else task.ignore_result),
            time_limit=task.time_limit or 0,
            soft_time_limit=task.soft_time_limit or 0,
        )

    def child_main(self, options: ChildOptions) -> ChildProcess:
        """Return what runs in each child."""
        return FastQChild(self.app, options)

    def child_spec(self, options: WorkerOptions, child: ChildOptions) -> ChildSpec:
        """Return how a spawned child makes what ``child_main`` returns."""
        place = place_of(self.app, self._origin.named)
        arguments = {"place": place, "origin": self._origin, "options": options, "child": replace(child, setup=None)}
        return ChildSpec("fastq.worker.spawned:make_child", arguments, place.program)

    def hooks(self, loop: asyncio.AbstractEventLoop) -> Hooks:
        """Return the plain hooks."""
        from fastq.worker.hooks import Hooks  # after the fork: children have no use for an event loop

        return Hooks(loop)

    def tell(self, what: str, **details: Any) -> Future[None] | None:
        """Nobody listens in the main process."""
