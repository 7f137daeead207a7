"""A worker's options in Celery's words, and the options that an application adds to Celery's command line.

``app.user_options`` holds click options: those of "worker", and those of "preload", which every command has.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import celery
import click
from celery import signals
from celery.app.defaults import NAMESPACES

from fastq.worker.options import WorkerOptions

#: Options that Celery's worker has no keyword for.
_OURS = {"adapts_prefetch", "color", "given_name", "grace_s", "hostname", "quiet", "reliable", "user"}


def read_user_options(
    app: celery.Celery, words: Sequence[str], command: str = "worker"
) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the options that the application has added, and the words that are none of them.

    Receivers of ``user_preload_options`` are told theirs. Raises UsageError for a word that looks like an option and is
    none, or whose value does not fit.
    """
    preload = list(app.user_options["preload"])
    parser = click.Command(
        command,
        params=[*app.user_options[command], *preload, click.Argument(["rest"], nargs=-1)],
        add_help_option=False,
        context_settings={"auto_envvar_prefix": f"CELERY_{command.upper()}"},
    )
    with parser.make_context(command, list(words)) as ctx:
        values = dict(ctx.params)
    rest = list(values.pop("rest"))
    told = {option.name: values[option.name] for option in preload if option.name}
    if told:
        signals.user_preload_options.send(sender=parser, app=app, options=told)
    return values, rest


def overrides_of(words: Sequence[str]) -> list[str]:
    """Return settings given as ``name=value`` so that Celery reads them: a name of no known kind is a worker's."""
    return [
        word if word[:1] in "._" or re.split("[._]", word)[0].lower() in NAMESPACES else f".{word}" for word in words
    ]


def celery_options(options: WorkerOptions) -> dict[str, Any]:
    """Return a worker's options by the names under which Celery hands them to its worker, the application's own too."""
    given = {each.name: getattr(options, each.name) for each in fields(options) if each.name not in _OURS}
    return {
        **given,
        "loglevel": logging.getLevelName("CRITICAL" if options.loglevel == "FATAL" else options.loglevel),
        **{name: list(given[name]) or None for name in ("queues", "exclude_queues", "include")},
        **{name: given[name] or None for name in ("logfile", "pidfile", "schedule_filename", "scheduler", "statedb")},
        "no_color": True if options.color is False else None,
        "pool_cls": options.pool or "prefork",
        **options.user,
    }


def as_celery_means(options: WorkerOptions, node: str) -> WorkerOptions:
    """Return the options with what Celery reads in another way: a zero stands for what the settings say."""
    names = ("concurrency", "prefetch_multiplier")
    return options.changed(**{name: getattr(options, name) or None for name in names}).named(node)
