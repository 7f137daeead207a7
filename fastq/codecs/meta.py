"""A task's state as it is stored: written in Celery's layout, and its exception rebuilt on the reader's side.

Rebuilding never imports a module and never calls code that a message chose: see ``rebuild_exception``. Source of the
layout: Celery 5.7's result backends.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import fastq.errors
from fastq.codecs import json
from fastq.codecs._walk import short_repr
from fastq.errors import DecodeError, RemoteError
from fastq.states import EXCEPTION_STATES, FAILURE, READY_STATES, RETRY, STARTED, SUCCESS

_OPENING = {state: b'{"status":"%b","result":' % state.encode() for state in (SUCCESS, FAILURE, RETRY, STARTED)}
_clock: tuple[int, str] = (0, "")


def encode_meta(
    task_id: str,
    state: str,
    result: Any = None,
    *,
    traceback: str | None = None,
    children: Sequence[str] = (),
    group_id: str | None = None,
    parent_id: str | None = None,
    extended: Mapping[str, Any] | None = None,
) -> bytes:
    """Return what stores keep of a task, as JSON. ``children`` are ids, ``extended`` the fields of ``result_extended``.

    An exception as the result of FAILURE, RETRY or REVOKED becomes its class name, module and arguments, whatever they
    are; any other value without a JSON form raises EncodeError.
    """
    if state in EXCEPTION_STATES and isinstance(result, BaseException):
        value = encode_exception(result)
    else:
        value = json.encode(result)
    opening = _OPENING.get(state) or b'{"status":%b,"result":' % json.encode(state)
    rest: dict[str, Any] = {
        "traceback": traceback,
        "children": [[[child, None], None] for child in children],
        "date_done": _utc_now() if state in READY_STATES else None,
        "task_id": task_id,
    }
    if group_id is not None:
        rest["group_id"] = group_id
    if parent_id is not None:
        rest["parent_id"] = parent_id
    if extended:
        rest.update({name: _storable(field) for name, field in extended.items()})
    return b"%b%b,%b" % (opening, value, json.encode(rest)[1:])


def decode_meta(data: bytes) -> dict[str, Any]:
    """Return a stored meta as a dict. Raises DecodeError when it is not one."""
    meta = json.decode(data)
    if not isinstance(meta, dict) or not isinstance(meta.get("status"), str):
        raise DecodeError(f"not a stored task state: {short_repr(meta, 80)}")
    return meta


def encode_exception(error: BaseException) -> bytes:
    """Return an exception as JSON; an argument without a JSON form is stored as its repr. Never fails."""
    cls = type(error)
    stored = {"exc_type": cls.__qualname__, "exc_message": _arguments_of(error), "exc_module": cls.__module__}
    try:
        return json.encode(stored)
    except Exception:  # an argument may run foreign code (__json__); the failure still has to be stored
        stored["exc_message"] = [_storable(argument) for argument in _arguments_of(error)]
        return json.encode(stored)


def _arguments_of(error: BaseException) -> list[Any]:
    """Return what an exception was made with; an OSError leaves its file names out of ``args``."""
    args = list(error.args)
    if not isinstance(error, OSError) or len(args) != 2 or not _has_builtin_constructor(type(error)):
        return args
    names = [os.fspath(name) if isinstance(name, os.PathLike) else name for name in (error.filename, error.filename2)]
    if names[1] is not None:
        return [*args, names[0], None, names[1]]  # between them stands Windows' own number
    return args if names[0] is None else [*args, names[0]]


def rebuild_exception(stored: Any, allowed: Sequence[type[BaseException]] = ()) -> Exception:
    """Return the exception that ``stored`` describes, or a RemoteError of the same name when its class cannot be used.

    A class is used when it is already imported (nothing is imported here) and is an Exception; its constructor is
    called only when it is a built-in one, or when the class is one of ours or in ``allowed``: then a stored result
    cannot run foreign code.
    """
    if isinstance(stored, Exception):
        return stored
    if not isinstance(stored, Mapping) or not isinstance(stored.get("exc_type"), str):
        return RemoteError(short_repr(stored))
    name, module = stored["exc_type"], stored.get("exc_module")
    module = module if isinstance(module, str) else "fastq.errors"
    args = stored.get("exc_message", ())
    args = args if isinstance(args, (list, tuple)) else (args,)
    cls = _find_class(module, name, allowed)
    if cls is not None:
        try:
            return cls(*args)
        except Exception:  # the constructor wants other arguments than the ones that were kept
            return _stand_in(module, name)(*args)
    return _stand_in(module, name)(*args)


def _find_class(module: str, name: str, allowed: Sequence[type[BaseException]]) -> type[Exception] | None:
    for cls in allowed:
        if cls.__module__ == module and cls.__qualname__ == name and issubclass(cls, Exception):
            return cls
    owner = sys.modules.get(module)
    if owner is None:
        return None
    # Straight from the dictionaries: attribute access may run code, and a lazy module would import itself.
    found: Any = owner
    for part in name.split("."):
        try:
            found = object.__getattribute__(found, "__dict__").get(part)
        except AttributeError:
            return None
    if not isinstance(found, type) or not issubclass(found, Exception):
        return None  # SystemExit and KeyboardInterrupt are not for others to raise here
    trusted = module == "builtins" or owner is fastq.errors
    return found if trusted or _has_builtin_constructor(found) else None


def _has_builtin_constructor(cls: type[BaseException]) -> bool:
    """Whether creating an instance runs only the interpreter's own code."""

    def owner_of(method: str) -> str:
        return next(base.__module__ for base in cls.__mro__ if method in vars(base))

    return type(cls).__call__ is type.__call__ and owner_of("__init__") == owner_of("__new__") == "builtins"


@functools.lru_cache(maxsize=256)
def _stand_in(module: str, name: str) -> type[RemoteError]:
    plain_name = name.rpartition(".")[2]
    if not plain_name.isidentifier() or len(name) > 200:
        return RemoteError
    return type(
        plain_name, (RemoteError,), {"__module__": module, "__qualname__": name, "__doc__": "Raised by a task."}
    )


def _storable(argument: Any) -> Any:
    try:
        json.encode(argument)
    except Exception:  # as in encode_exception
        return short_repr(argument)
    return argument


def _utc_now() -> str:
    """Return the time as Celery writes ``date_done``. The date is formatted once a second."""
    global _clock
    now = time.time()
    second = int(now)
    known, text = _clock
    if known != second:
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        _clock = (second, text)
    return f"{text}.{int((now - second) * 1e6):06d}+00:00"
