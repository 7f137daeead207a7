"""Parts that other packages bring: named as ``module:NAME``, or by an entry point. Knows no kind of part."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeAlias, TypeVar

from fastq.errors import SettingsError

#: An object to be called, or where it is: ``module:name``.
Target: TypeAlias = "str | Callable[..., Any]"

T = TypeVar("T")


def load(target: Target) -> Any:
    """Return what a target names."""
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def find_plugin(group: str, name: str, kind: type[T]) -> T | None:
    """Return the part that ``name`` stands for: ``module:NAME``, or an entry point of the group; None for neither.

    Raises SettingsError when it cannot be imported, or is of another kind.
    """
    if ":" in name:
        return _checked(name, _import(name), kind)
    from importlib import metadata  # slow to load, and hardly ever needed

    for point in metadata.entry_points(group=group):
        if point.name == name:
            return _checked(point.value, _import(point.value), kind)
    return None


def _import(place: str) -> object:
    try:
        found: object = load(place)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"{place!r} cannot be imported: {error}") from error
    return found


def _checked(place: str, found: object, kind: type[T]) -> T:
    if not isinstance(found, kind):
        raise SettingsError(f"{place!r} is a {type(found).__name__}; expected a {kind.__module__}.{kind.__qualname__}")
    return found
