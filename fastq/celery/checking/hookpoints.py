"""Where tools put code of their own into Celery, and why a task must therefore run through Celery's own tracer.

Looked at once per task. Receivers of signals do not count: the straight way sends every signal that has one. Neither do
the handlers and the ``__call__`` of a task's own class, which it calls. Changes nothing, opens no connection.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache
from inspect import getattr_static
from types import FunctionType, ModuleType
from typing import Any

import billiard
import billiard.pool
import celery
import kombu
import kombu.serialization
from celery.app import trace
from celery.app.task import Task
from celery.utils.imports import symbol_by_name

from fastq.celery.conf.settings import own_store

_FASTQ = sys.modules["fastq"]

#: The defaults of a task's attributes that name classes of the worker.
REQUEST = "celery.worker.request:Request"
STRATEGY = "celery.worker.strategy:default"

#: What the keys of results start with, behind a global prefix.
KEY_PREFIX = "celery-task-meta-"


def touched(task: Any, app: celery.Celery) -> list[str]:
    """Return why the task must run through Celery's own tracer, in plain words; [] when it may run straight."""
    return [
        *replaced_everywhere(app),
        *_replaced_in_task(task),
        *_overridden(task),
        *_results_kept_apart(task, app),
    ]


def replaced_everywhere(app: celery.Celery) -> Iterator[str]:
    """Yield what is replaced in Celery itself, which concerns every task."""
    yield from _replaced((trace, "build_tracer"), (trace, "trace_task"), (Task, "__call__"))
    encoder = kombu.serialization.registry._encoders.get("json")
    if encoder is None or not is_genuine(encoder.encoder):
        yield "the serializer 'json' is not kombu's own"


def _replaced(*places: tuple[Any, str]) -> Iterator[str]:
    for place, name in places:
        function = getattr_static(place, name)
        if not is_genuine(function):
            where = place.__name__ if isinstance(place, ModuleType) else f"{place.__module__}.{place.__qualname__}"
            yield f"{where}.{name} is replaced by {origin_of(function)}"


def _replaced_in_task(task: Any) -> Iterator[str]:
    run = vars(task).get("run")
    # Celery itself does this for autoretry_for.
    if run is not None and not is_genuine(run):
        yield f"run of the task is replaced by {origin_of(run)}"
    tracer = getattr(task, "__trace__", None)
    if tracer is not None and not is_genuine(tracer):
        yield f"the task's tracer is replaced by {origin_of(tracer)}"
    for base in type(task).__mro__:
        # app.Task and its like: made by Celery, in Celery's name. Task itself is looked at with what concerns all.
        if base.__module__.partition(".")[0] == "celery" and base is not Task and "__call__" in vars(base):
            yield from _replaced((base, "__call__"))


def _overridden(task: Any) -> Iterator[str]:
    for attribute, default in (("Request", REQUEST), ("Strategy", STRATEGY)):
        if has_own(task, default):
            value = getattr(task, attribute)
            yield f"the task has its own {attribute}, {value if isinstance(value, str) else _name_of(value)}"


def has_own(task: Any, default: str) -> bool:
    """Return whether a task names a class of the worker of its own: in place of ``REQUEST`` or of ``STRATEGY``."""
    value = getattr(task, "Request" if default == REQUEST else "Strategy", default)
    return bool(value != default and symbol_by_name(value) is not symbol_by_name(default))


def _results_kept_apart(task: Any, app: celery.Celery) -> Iterator[str]:
    """Yield why the worker cannot store the task's results as Celery would."""
    backend, conf = task.backend, app.conf
    kind = own_store(backend)
    if kind == "disabled":
        return
    if not kind:
        if not task.ignore_result:
            yield f"its results go to {_name_of(type(backend))}, which only Celery's own code writes"
        return
    yield from _patched_methods(backend)
    if task.ignore_result:
        return
    if backend.serializer != "json":
        yield f"results are serialized by {backend.serializer!r}"
    if conf.get("result_compression"):
        yield f"results are compressed by {conf.result_compression!r}"
    if kind == "rpc" and backend.persistent:
        yield "results are sent as persistent messages"
    if kind == "redis" and _text(backend.task_keyprefix) != _expected_prefix(backend):
        yield f"the keys of results start with {_text(backend.task_keyprefix)!r}"


def _patched_methods(backend: Any) -> Iterator[str]:
    for name, value in vars(backend).items():
        if isinstance(getattr_static(type(backend), name, None), FunctionType) and not is_genuine(value):
            yield f"{name} of the result store is replaced by {origin_of(value)}"
    for cls in type(backend).__mro__[:-1]:
        for name, value in vars(cls).items():
            # A wrapper made by a tool is callable and no plain function; classes and descriptors are none of it.
            is_method = isinstance(value, FunctionType) or (callable(value) and not isinstance(value, type))
            if is_method and _is_celerys(cls) and not is_genuine(value):
                yield f"{cls.__qualname__}.{name} is replaced by {origin_of(value)}"


def _expected_prefix(backend: Any) -> str:
    options = backend.app.conf.result_backend_transport_options or {}
    prefix = str(options.get("global_keyprefix") or "")
    return (prefix if prefix[-1:] in ("", ":", "_", "-", ".") else f"{prefix}_") + KEY_PREFIX


# --- functions and where they come from -------------------------------------------------------------------------------


def is_genuine(function: Any) -> bool:
    """Whether a function's code stands in a file of Celery, kombu or billiard: what it claims in its name is not asked.

    A function of fastq counts as what it stands in for, which is its ``__wrapped__``.
    """
    function = _stood_in_for(function)
    return type(function) is FunctionType and _is_in(function, celery, kombu, billiard, _FASTQ)


def origin_of(function: Any) -> str:
    """Return the module in which the code of a replacement stands, or what kind of object it is."""
    function = _stood_in_for(function)
    function = getattr(function, "_self_wrapper", function)  # what wrapt's objects call
    function = getattr(function, "__func__", function)
    if type(function) is FunctionType:
        return str(function.__globals__.get("__name__", "unknown code"))
    return f"a {_name_of(type(function))}"


def _stood_in_for(function: Any) -> Any:
    """Return a method's function, and in place of one of fastq's the one that it replaced."""
    function = getattr(function, "__func__", function)
    while type(function) is FunctionType and _is_in(function, _FASTQ) and "__wrapped__" in vars(function):
        wrapped = vars(function)["__wrapped__"]
        function = getattr(wrapped, "__func__", wrapped)
    return function


def _is_in(function: FunctionType, *packages: ModuleType) -> bool:
    return os.path.abspath(function.__code__.co_filename).startswith(_folders(*packages))


@cache
def _folders(*packages: ModuleType) -> tuple[str, ...]:
    return tuple(os.path.join(os.path.abspath(path), "") for package in packages for path in package.__path__)


def _is_celerys(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("celery", "kombu")


def _name_of(cls: Any) -> str:
    return f"{getattr(cls, '__module__', '')}.{getattr(cls, '__qualname__', repr(cls))}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
