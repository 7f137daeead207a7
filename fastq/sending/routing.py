"""Where a task's messages go: ``task_routes`` and queue names to an exchange and a routing key. Opens nothing.

Routes, as in Celery: a dict of task names or globs, a list of pairs, a callable ``(name, args, kwargs, options,
task=None)``, the dotted path of one of these, or a list that mixes them. The first that answers wins; in a dict an
exact name wins over a glob.
"""

from __future__ import annotations

import fnmatch
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fastq.errors import SettingsError

#: A router function's answer: a queue name, a dict with the fields of Route, or None for "not mine".
Answer: TypeAlias = "str | Mapping[str, Any] | None"
RouterFunction: TypeAlias = Callable[..., Answer]

_FIELDS = ("queue", "exchange", "routing_key", "priority")


@dataclass(frozen=True)
class Route:
    """What a route says; None leaves it to the task and the settings."""

    queue: str | None = None
    exchange: str | None = None
    routing_key: str | None = None
    priority: int | None = None


NO_ROUTE = Route()


class Router:
    """The routes of one application, checked when it is made."""

    def __init__(self, routes: Any) -> None:
        self._rules = _rules(routes)

    @property
    def is_static(self) -> bool:
        """Whether a task's name alone decides; else every call asks anew."""
        return not any(isinstance(rule, _Function) for rule in self._rules)

    def route(
        self, name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, task: object = None
    ) -> Route:
        """Return the first route for a task name."""
        for rule in self._rules:
            found = rule.find(name) if isinstance(rule, _Table) else rule.ask(name, args, kwargs or {}, task)
            if found is not None:
                return found
        return NO_ROUTE


class _Table:
    """Routes by name: exact ones first, then globs and patterns in their order."""

    def __init__(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        self._exact: dict[str, Route] = {}
        self._patterns: list[tuple[re.Pattern[str], Route]] = []
        for key, answer in pairs:
            route = _route(answer, f"task_routes[{key!r}]")
            if isinstance(key, re.Pattern):
                self._patterns.append((key, route))
            elif not isinstance(key, str):
                raise SettingsError(
                    f"setting 'task_routes' has the key {key!r}; expected a task name, a glob or a pattern"
                )
            elif any(sign in key for sign in "*?["):
                self._patterns.append((re.compile(fnmatch.translate(key)), route))
            else:
                self._exact.setdefault(key, route)

    def find(self, name: str) -> Route | None:
        """Return the route for a task name."""
        exact = self._exact.get(name)
        if exact is not None:
            return exact
        return next((route for pattern, route in self._patterns if pattern.match(name)), None)


class _Function:
    """A router function, asked for every call."""

    def __init__(self, function: RouterFunction) -> None:
        self._function = function

    def ask(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], task: object) -> Route | None:
        """Return the function's route for one call."""
        answer = self._function(name, args, kwargs, {}, task=task)
        return None if answer is None else _route(answer, f"the answer of router {self._function!r}")


def _rules(routes: Any) -> list[_Table | _Function]:
    if routes is None:
        return []
    if isinstance(routes, str):
        return _rules(_import(routes))
    if isinstance(routes, Mapping):
        return [_Table(list(routes.items()))]
    if callable(routes):
        return [_Function(routes)]
    if isinstance(routes, (list, tuple)):
        if routes and all(isinstance(item, (list, tuple)) and len(item) == 2 for item in routes):
            return [_Table([(key, answer) for key, answer in routes])]
        return [rule for item in routes for rule in _rules(item)]
    raise SettingsError(
        f"setting 'task_routes' holds {routes!r:.80}; expected a dict, a list, a function or a dotted path"
    )


def _import(path: str) -> Any:
    """Return what a dotted path in ``task_routes`` names: ``package.module.name`` or ``package.module:name``."""
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(f"setting 'task_routes' names {path!r}, which cannot be imported: {error}") from error
    return found() if isinstance(found, type) else found


def _route(answer: Answer, where: str) -> Route:
    if isinstance(answer, str):
        return Route(queue=answer)
    if not isinstance(answer, Mapping):
        raise SettingsError(f"{where} is {answer!r:.80}; expected a queue name or a dict with {', '.join(_FIELDS)}")
    unknown = set(answer) - set(_FIELDS)
    if unknown:
        raise SettingsError(f"{where} has the unknown field {min(map(str, unknown))!r}; known: {', '.join(_FIELDS)}")
    return Route(**answer)
