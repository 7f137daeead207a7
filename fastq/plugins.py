"""Parts that other packages bring, named as ``module:NAME`` or by an entry point; and what is said of unknown ones.

Knows no kind of part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib import import_module
from operator import attrgetter
from typing import Any, Final, TypeAlias, TypeVar

from fastq.errors import FastqError, SettingsError

#: An object to be called, or where it is: ``module:name``.
Target: TypeAlias = "str | Callable[..., Any]"

T = TypeVar("T")

#: What a broker is called, where its scheme is called otherwise.
_CALLED: Final = {"rabbitmq": "amqp"}


def load(target: Target) -> Any:
    """Return what a target names. Raises SettingsError when it cannot be imported."""
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    try:
        return attrgetter(name)(import_module(module))
    except FastqError:  # it says by itself what is wrong
        raise
    except Exception as error:
        raise _unloadable(repr(target), error) from error


def find_plugin(group: str, name: str, kind: type[T]) -> T | None:
    """Return the part that ``name`` stands for: ``module:NAME``, or an entry point of the group; None for neither.

    Raises SettingsError when it cannot be imported, or is of another kind.
    """
    if ":" in name:
        return _checked(repr(name), load(name), kind)
    from importlib import metadata  # slow to load, and hardly ever needed

    for point in metadata.entry_points(group=group):
        if point.name.lower() == name:
            package = point.dist.name if point.dist else "an unknown package"
            place = f"{point.value!r} (entry point {point.name!r} of {package})"
            try:
                found = point.load()
            except Exception as error:
                raise _unloadable(place, error) from error
            return _checked(place, found, kind)
    return None


def plugin_names(group: str) -> list[str]:
    """Return the names of a group's entry points."""
    from importlib import metadata

    return [point.name.lower() for point in metadata.entry_points(group=group)]


def unknown_part(scheme: str, masked: str, problem: str, setting: str, schemes: Iterable[str]) -> SettingsError:
    """Return the error for a URL, its secrets masked, that names no known part: what may have been meant."""
    near = _nearest(scheme or re.split(r"[^\w+.-]", masked, maxsplit=1)[0].lower(), schemes)
    hint = f"; did you mean {near}://?" if near else ""
    known = ", ".join(name if name == "disabled" else f"{name}://" for name in (*schemes, "module:NAME"))
    if not scheme or "://" not in masked:
        return SettingsError(f"{setting} {masked!r} is no URL{hint or '.'} Expected one of {known}")
    return SettingsError(f"{problem} {scheme}://{hint or '.'} Set {setting} to one of {known}")


def _nearest(scheme: str, schemes: Iterable[str]) -> str:
    import difflib  # only needed on the way to an error

    near = difflib.get_close_matches(scheme, list(schemes), 1)
    return _CALLED.get(scheme) or (near[0] if near else "")


def _checked(place: str, found: object, kind: type[T]) -> T:
    if not isinstance(found, kind):
        raise SettingsError(f"{place} is a {type(found).__name__}; expected a {kind.__module__}.{kind.__qualname__}")
    return found


def _unloadable(place: str, error: Exception) -> SettingsError:
    kind = "" if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: "
    return SettingsError(f"{place} cannot be imported: {kind}{error}")
