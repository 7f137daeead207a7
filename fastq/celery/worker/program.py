"""A Celery application as a program of the worker: its settings and tasks, its signals in Celery's order."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import celery
from celery import signals
from celery.app import trace
from celery.utils.collections import AttributeDict
from celery.utils.nodenames import worker_direct
from celery.utils.serialization import jsonify
from celery.utils.text import pretty
from celery.utils.time import rate
from kombu.utils.encoding import safe_repr

from fastq.celery.checking.hookpoints import REQUEST, STRATEGY, has_own
from fastq.celery.cli.client import check_transport, check_urls
from fastq.celery.conf.carried import pool_of, warnings_of
from fastq.celery.conf.options import as_celery_means, celery_options, overrides_of, read_user_options
from fastq.celery.conf.pools import pool_name
from fastq.celery.conf.serializers import register_serializers
from fastq.celery.conf.settings import blaming, number_of, own_store, settings_of_app
from fastq.celery.worker import logs
from fastq.celery.worker.beat import Beat
from fastq.celery.worker.bootsteps import Steps
from fastq.celery.worker.consumer import Worker
from fastq.celery.worker.inside import Inside, show_state
from fastq.celery.worker.spawned import changed_settings
from fastq.errors import SettingsError
from fastq.pool import ChildSpec, CompanionMain
from fastq.running.birth import ChildOptions
from fastq.running.child import ChildProcess
from fastq.settings import Settings
from fastq.worker.place import Origin, place_of
from fastq.worker.process.log import escape_arguments
from fastq.worker.report import software, without_password

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future

    from celery.utils.dispatch import Signal

    from fastq._child import TaskRules
    from fastq.celery.worker.parent import CeleryHooks
    from fastq.celery.worker.threads import Recorder
    from fastq.worker.hooks import Hooks
    from fastq.worker.options import WorkerOptions
    from fastq.worker.remote.commands.command import WorkerView

logger = logging.getLogger("celery.worker")

_UNKNOWN = Origin()


class CeleryProgram:
    """A Celery application. Its settings are read when they are asked for first: ``load`` may still change them."""

    node = "celery"
    process_title = "celeryd"
    answers_all = True

    def __init__(self, app: celery.Celery, origin: Origin = _UNKNOWN) -> None:
        self.app = app
        self._origin = origin
        self._overrides: Sequence[str] = ()
        self._loaded: Mapping[str, Any] = {}  # the settings before receivers of signals may have changed them
        self._options: WorkerOptions
        self._asked: Sequence[str] = ()
        self._hostname = ""
        self._logfile = ""
        self._has_own_logging = False
        self._instance: Worker | None = None
        self._steps = Steps(self._ask_stop)
        self._hooks: CeleryHooks | None = None

    @property
    def title(self) -> str:
        """Return the application's name."""
        return f"{self.app.main or '__main__'}:{id(self.app):#x}"

    @property
    def names(self) -> Sequence[str]:
        """Return the names of the tasks."""
        return list(self.app.tasks)

    @property
    def async_names(self) -> AbstractSet[str]:
        """Return the names of those that are coroutine functions."""
        from fastq.celery.running.coroutines import is_async

        return {name for name, task in self.app.tasks.items() if is_async(task)}

    def configuration(self, with_defaults: bool) -> dict[str, Any]:
        """Return the settings as Celery's workers show them, without secrets."""
        check_urls(self.app)
        found: dict[str, Any] = jsonify(
            self.app.conf.table(with_defaults=with_defaults), keyfilter=_is_shown, unknown_type_filter=safe_repr
        )
        return _without_secrets(self.app, found)

    def report(self) -> str:
        """Return Celery's report with our versions in it."""
        return bug_report(self.app)

    @property
    def commands(self) -> Mapping[str, Callable[..., Any]]:
        """Return the remote control commands that the application has registered."""
        from celery.worker.control import Panel

        return {
            name: partial(self._run_command, command)
            for name, command in Panel.data.items()
            if command.__module__ != "celery.worker.control"
        }

    def _run_command(self, command: Callable[..., Any], view: WorkerView, **arguments: Any) -> Any:
        return command(self._state, **arguments)

    @cached_property
    def _state(self) -> AttributeDict:
        """What commands get first; one for the worker's life, as they may keep things in it."""
        consumer = self._instance.consumer if self._instance is not None else None
        return AttributeDict(app=self.app, hostname=self._hostname, consumer=consumer, tset=set)

    @property
    def registry(self) -> Mapping[str, Any]:
        """Return the task objects by name."""
        return dict(self.app.tasks)

    def mark_revoked(self, ids: Sequence[str]) -> None:
        """Store the state REVOKED for tasks that have not begun; does not wait."""
        if self._hooks is not None:
            self._hooks.mark_revoked(ids)

    @cached_property
    def settings(self) -> Settings:
        """Return the application's settings."""
        return settings_of_app(self.app, self._asked)

    @property
    def shown_results(self) -> str:
        """Return the result backend's URL without its password."""
        return str(self.app.backend.as_uri())

    @cached_property
    def results(self) -> str:
        """Return where the worker stores results by itself: "disabled" when Celery's code in the child does."""
        store = own_store(self.app.backend)
        if store == "redis":
            return str(self.settings.result_backend)
        return "rpc://" if store == "rpc" else "disabled"

    # --- start

    def adopt(self, options: WorkerOptions, words: Sequence[str]) -> tuple[WorkerOptions, list[str]]:
        """Return the options as Celery means them, with those that the application has added, and the other words."""
        user, rest = read_user_options(self.app, words)
        pool = pool_name(options.pool) or options.pool
        self._options = as_celery_means(options, self.node).changed(user=user, pool=pool)
        return self._options, rest

    def load(self, options: WorkerOptions, overrides: Sequence[str]) -> None:
        """Import the task modules as a worker does."""
        if options.disable_prefetch is not None:
            self.app.conf.worker_disable_prefetch = options.disable_prefetch
        if options.reliable is not None:
            self.app.conf.fastq_reliable = options.reliable
        if overrides:
            try:
                self.app.config_from_cmdline(overrides_of(overrides), namespace="worker")
            except (KeyError, ValueError) as error:
                raise SettingsError(f"a setting after -- cannot be read: {error}. Write name=value") from error
        self.app.loader.init_worker()
        self.app.finalize()
        register_serializers(self.app)
        self._overrides = overrides
        self._loaded = dict(self.app.conf.changes)

    def complete(self, options: WorkerOptions) -> WorkerOptions:
        """Return the options with the files and the pool that the settings name where the command line names none."""
        conf = self.app.conf
        options = options.changed(pool=options.pool or pool_of(self.app))
        files = {name: getattr(options, name) or conf.get(f"worker_{name}") or "" for name in ("logfile", "pidfile")}
        self._options = self._options.changed(pool=options.pool, **files)
        return options.changed(**files)

    @property
    def process_settings(self) -> Mapping[str, str]:
        """Return ``worker_uid``, ``worker_gid``, ``worker_umask`` and ``worker_executable``."""
        found = {name: self.app.conf.get(f"worker_{name}") for name in ("uid", "gid", "umask", "executable")}
        if isinstance(found["umask"], int):
            found["umask"] = f"{found['umask']:o}"
        return {name: "" if value is None else str(value) for name, value in found.items()}

    def begin(self, options: WorkerOptions) -> None:
        """Send ``celeryd_init`` and ``worker_init``."""
        app = self.app
        self._hostname = options.hostname
        check_urls(app)
        check_transport(app)
        self._instance = Worker(app, options, self._steps.thread)
        trace.setup_worker_optimizations(app, options.hostname)
        given = self._instance.options = celery_options(self._options)
        signals.celeryd_init.send(sender=options.hostname, instance=self._instance, conf=app.conf, options=given)
        self._select_queues()
        # Receivers may have changed the configuration, which is what the signal is there for.
        self.__dict__.pop("settings", None)
        signals.worker_init.send(sender=self._instance)

    def _select_queues(self) -> None:
        options, queues = self._options, self.app.amqp.queues
        self._asked = options.queues
        with suppress(KeyError):  # a queue that is not declared: the worker says so when it chooses its queues
            queues.select(list(options.queues))
            queues.deselect(list(options.exclude_queues))
        if self.app.conf.worker_direct:
            queues.select_add(worker_direct(self._hostname))

    def setup_logging(self, handler: logging.StreamHandler[Any], options: WorkerOptions) -> None:
        """Have Celery set logging up, ``setup_logging`` and its other signals included."""
        self._has_own_logging = logs.set_up(self.app, options)
        logs.speak_as_celery()
        escape_arguments()
        self._logfile = options.logfile

    def prepare(self, options: WorkerOptions) -> WorkerOptions:
        """Tell the application that all is set up and that processes are about to be forked; return what it changed."""
        for line in warnings_of(self.app):
            logger.warning("%s", line)
        trace.setup_worker_optimizations(self.app, options.hostname)
        assert self._instance is not None
        self._steps.make(self._instance, options.user)
        signals.celeryd_after_setup.send(sender=options.hostname, instance=self._instance, conf=self.app.conf)
        signals.worker_before_create_process.send(sender=self._instance)
        queues = tuple(queue.name for queue in self.app.amqp.queues.consume_from.values())
        if {*queues} != {*options.queues}:
            # A receiver of celeryd_after_setup has chosen others, which is what the signal is there for.
            self._asked = queues
            self.__dict__.pop("settings", None)
        return options.changed(queues=queues)

    def task_rules(self, options: WorkerOptions) -> list[TaskRules]:
        """Return how the calls of each task are to be treated."""
        return [self._options_of(task, bool(options.reliable)) for task in self.app.tasks.values()]

    def _options_of(self, task: Any, reliable: bool) -> TaskRules:
        from fastq._child import TaskRules  # after the fork: children have no message loop

        limits = {}
        for name in ("time_limit", "soft_time_limit"):
            value = getattr(task, name)
            limits[name] = number_of(f"{name} of task {task.name} (or task_{name})", value) if value else 0
        if task.rate_limit and not self.app.conf.worker_disable_rate_limits:
            with blaming(f"rate_limit of task {task.name}", "task_default_rate_limit"):
                limits["rate_limit"] = float(rate(task.rate_limit))
        return TaskRules(
            task.name,
            acks_late=bool(task.acks_late) or reliable,
            requeue_lost=reliable,
            reject_failed=not _acks_on_failure(task),
            handed_over=has_own(task, STRATEGY),
            handed_in_turn=has_own(task, REQUEST),
            ignore_result=bool(task.ignore_result),
            **limits,
        )

    def child_main(self, options: ChildOptions) -> ChildProcess:
        """Return what runs in each child."""
        from fastq.celery.running.child import CeleryChild

        self._redirect(options)
        options = replace(options, setup=logs.ChildLogging(self.app, self._logfile, self._hostname, options.calls))
        return CeleryChild(self.app, options, self.results)

    def child_spec(self, options: WorkerOptions, child: ChildOptions) -> ChildSpec:
        """Return how a spawned child makes what ``child_main`` returns."""
        place = None if self._origin.is_default else place_of(self.app, self._origin.named)
        self._redirect(child)
        arguments = {
            "place": place,
            "overrides": list(self._overrides),
            "changes": changed_settings(self.app, self._loaded),
            "options": options.changed(user={}),
            "child": replace(child, setup=None),
            "results": self.results,
        }
        program = "" if place is None else place.program
        return ChildSpec("fastq.celery.worker.spawned:make_child", arguments, program)

    def _redirect(self, options: ChildOptions) -> None:
        """Turn what is printed from now on into records, unless the application sees to its logging."""
        if not self._has_own_logging and not options.keeps_streams:
            logs.redirect(self.app)

    @property
    def companion(self) -> CompanionMain | None:
        """Return the beat, if one was asked for."""
        options = self._options
        return Beat(self.app, options.schedule_filename, options.scheduler) if options.beat else None

    def hooks(self, loop: asyncio.AbstractEventLoop) -> Hooks:
        """Return the hooks that speak Celery."""
        from fastq.celery.worker.parent import CeleryHooks  # after the fork: children have no use for an event loop

        assert self._instance is not None
        self._hooks = CeleryHooks(loop, self.app, self._instance, self._steps.start)
        return self._hooks

    def _ask_stop(self, how: str) -> None:
        assert self._instance is not None
        (self._instance.stop if how == "warm" else self._instance.terminate)()

    def tell(self, what: str, **details: Any) -> Future[None] | None:
        """Send the signal that belongs to an event in the worker's life; its receivers run in the recorder's thread."""
        instance, hooks = self._instance, self._hooks
        if instance is None or hooks is None:
            return None
        if what == "starting":
            instance.can_stop(details["life"].stop_soon)
        elif what == "connected":
            if instance.inside is None:
                instance.inside = Inside(details["loop"], details["view"])
                show_state(instance.inside, self.app, self._hostname)
            self._steps.connected()
        elif what == "ready":
            return _send(hooks.recorder, signals.worker_ready, sender=instance.consumer)
        elif what == "stopping":
            self._steps.quiet()
            how = details["how"]
            return _send(
                hooks.recorder,
                signals.worker_shutting_down,
                sender=self._hostname,
                sig=signal.Signals(details["signum"]).name,
                how=how.capitalize(),
                exitcode=int(how == "cold"),
            )
        elif what == "stopped":
            return hooks.recorder.promise(self._end)
        return None

    def _end(self) -> None:
        self._steps.stop()
        self.app.loader.shutdown_worker()
        signals.worker_shutdown.send(sender=self._instance)


def _send(recorder: Recorder, told: Signal, **arguments: Any) -> Future[None] | None:
    """Send a signal from the recorder's thread; None when nobody listens."""
    return recorder.promise(partial(told.send, **arguments)) if told.receivers else None


def bug_report(app: celery.Celery) -> str:
    """Return Celery's report on an application, with our versions among those of the software."""
    check_urls(app)
    text = str(app.bugreport()).replace("\nplatform ->", f"\n            {software()}\nplatform ->", 1)
    settings = app.conf.table(with_defaults=False)
    lines = (f"{name}: {pretty(value, width=50)}" for name, value in _without_secrets(app, settings).items())
    return text.replace(app.conf.humanize(with_defaults=False), "\n".join(lines))


def _without_secrets(app: celery.Celery, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as Celery shows them, without what it leaves: it looks for no URL inside of a setting."""
    return {name: _masked(name, value) for name, value in {**settings, **_bare_urls(app)}.items()}


def _masked(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _masked(str(key), each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_masked(name, each) for each in value)
    return without_password(name, value) if isinstance(value, str) and "********@" not in value else value


def _bare_urls(app: celery.Celery) -> dict[str, Any]:
    """Return the settings that are to be URLs and have no scheme, as they are; Celery takes such for host names."""
    found = {name: app.conf.get(name) for name in ("broker_url", "broker_read_url", "broker_write_url")}
    return {name: value for name, value in found.items() if "@" in str(value) and "://" not in str(value)}


def _is_shown(name: object) -> bool:
    return isinstance(name, str) and not name.startswith("__")


def _acks_on_failure(task: Any) -> bool:
    """Return whether a failed call is acknowledged, if acknowledgement is late. Celery before 5.7 has one switch."""
    own = getattr(task, "acks_on_failure", None)
    return bool(task.acks_on_failure_or_timeout if own is None else own)
