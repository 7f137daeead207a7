"""Whether the functions that a publish goes through in Celery and kombu are still theirs. Calls none of them.

Tools that watch an application replace one or the other; their version must then be what runs.
"""

from __future__ import annotations

from types import FunctionType, ModuleType

import celery
import celery.app.amqp
import celery.app.base
import celery.app.utils
import kombu.messaging

from fastq.pool.patched import patched_by


def is_own(function: object, module: ModuleType, name: str) -> bool:
    """Whether a function is the one that a module defines under this name, and nobody's wrapper around it."""
    return (
        type(function) is FunctionType
        and function.__globals__ is vars(module)
        and function.__code__.co_name == name
        and not hasattr(function, "__wrapped__")
    )


def obstacle(app: celery.Celery) -> str:
    """Return why an application's messages have to go through Celery's own code, "" when they need not."""
    amqp = app.amqp
    for holder, module, name in (
        (type(app), celery.app.base, "send_task"),
        (kombu.messaging.Producer, kombu.messaging, "publish"),
        (kombu.messaging.Producer, kombu.messaging, "_publish"),
        (amqp.__dict__, celery.app.amqp, "send_task_message"),
    ):
        function = holder.get(name) if isinstance(holder, dict) else getattr(holder, name)
        if not is_own(function, module, name):
            return f"{name} was replaced: {function!r:.120}"
    if type(amqp) is not celery.app.amqp.AMQP or amqp.Producer is not kombu.messaging.Producer:
        return f"app.amqp is {type(amqp).__module__}.{type(amqp).__qualname__}"
    if getattr(amqp.create_task_message, "__func__", None) is not celery.app.amqp.AMQP.as_task_v2:
        return f"task_protocol is {app.conf.task_protocol!r}, or app.amqp.create_task_message was replaced"
    if type(app.conf) is not celery.app.utils.Settings or app.conf.key_t is not None:
        return f"app.conf is a {type(app.conf).__qualname__}"
    library = patched_by()
    return f"the process is monkey-patched by {library}" if library else ""
