"""A Celery application in a spawned child: imported anew, and made ready as Celery does in a fresh interpreter.

Signals of the worker (``celeryd_init``, ``worker_init``) are the main process's; those of logging and of the child's
own life are sent here.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import celery
from celery.app import trace

from fastq.celery.conf.options import overrides_of
from fastq.celery.conf.serializers import register_serializers
from fastq.celery.conf.settings import default_app
from fastq.celery.worker import logs
from fastq.running.birth import ChildOptions
from fastq.running.child import ChildProcess
from fastq.worker.options import WorkerOptions
from fastq.worker.place import Place
from fastq.worker.process.log import escape_arguments

logger = logging.getLogger("celery.worker")

#: Django's checks of the project: the main process has done them.
_SKIP_CHECKS = "CELERY_SKIP_CHECKS"


def make_child(
    place: Place | None,
    overrides: Sequence[str],
    changes: Mapping[str, bytes],
    options: WorkerOptions,
    child: ChildOptions,
    results: str,
) -> ChildProcess:
    """Return what runs in the child.

    ``place`` None is Celery's default application. ``overrides`` are settings from the command line, ``changes`` those
    that receivers of signals have changed, pickled. ``options`` are the worker's, complete.
    """
    app: celery.Celery = default_app() if place is None else place.find()
    for name in options.include:
        import_module(name)
    app.conf.fastq_reliable = bool(options.reliable)
    if overrides:
        app.config_from_cmdline(overrides_of(overrides), namespace="worker")
    for name, value in changes.items():
        app.conf[name] = pickle.loads(value)  # noqa: S301  from the main process
    _load(app)
    trace.setup_worker_optimizations(app, options.hostname)
    has_own_logging = logs.set_up(app, options)
    logs.speak_as_celery()
    escape_arguments()
    if not has_own_logging:
        logs.redirect(app)
    from fastq.celery.running.child import CeleryChild  # the main process has no use for it

    setup = logs.ChildLogging(app, options.logfile, options.hostname, child.calls)
    made = CeleryChild(app, replace(child, setup=setup), results)
    made.prepare()
    return made


def _load(app: celery.Celery) -> None:
    """Import the task modules as the main process has done."""
    given = os.environ.get(_SKIP_CHECKS)
    os.environ[_SKIP_CHECKS] = "true"
    try:
        app.loader.init_worker()
    finally:
        if given is None:
            del os.environ[_SKIP_CHECKS]
    app.finalize()
    register_serializers(app)
    for fixup in getattr(app, "_fixups", ()):
        # Django's: it closes connections between tasks, which it begins to do with a signal of the main process.
        if hasattr(fixup, "on_worker_init"):
            fixup.worker_fixup.install()


def changed_settings(app: celery.Celery, before: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the settings that differ from those before, pickled, but for those that cannot be."""
    found = {}
    for name, value in dict(app.conf.changes).items():
        if name not in before or before[name] is not value:
            try:
                found[name] = pickle.dumps(value)
            except Exception as error:  # of somebody's own class
                logger.warning(
                    "the setting %s, which a receiver of a signal has changed, stays as it was in spawned "
                    "children: it cannot be pickled (%s)",
                    name,
                    error,
                )
    return found
