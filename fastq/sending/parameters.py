"""How a function may be called, prepared so that every sending can be checked at almost no cost. Calls nothing."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_UNLIMITED = sys.maxsize


class Parameters:
    """The parameters of a function. From ``least`` to ``most`` positional arguments and no others are always fine."""

    __slots__ = ("_by_name", "_positional", "_required", "_signature", "least", "most")

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self.least, self.most = 0, _UNLIMITED
        self._signature = _signature(function)
        if self._signature is None:
            return
        found = self._signature.parameters.values()
        positional = [one for one in found if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        optional = {one.name for one in found if one.default is not one.empty}
        variable = {one.name for one in found if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
        self._positional = tuple(one.name for one in positional)
        self._by_name = frozenset(
            one.name for one in found if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        )
        self._required = frozenset(one.name for one in found) - optional - variable
        # A call that needs names is never settled by the number of its positional arguments.
        self.least = len(self._required) if self._required <= {*self._positional} else _UNLIMITED
        self.most = _UNLIMITED if any(one.kind is one.VAR_POSITIONAL for one in found) else len(positional)

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError when the function cannot be called with these arguments."""
        if self._signature is None or (not kwargs and self.least <= len(args) <= self.most) or self._fits(args, kwargs):
            return
        self._signature.bind(*args, **kwargs)

    def _fits(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call is certainly fine; ten times as fast as ``bind``, which decides the rest and words errors."""
        filled = self._positional[: len(args)]
        names = kwargs.keys()
        return (
            len(args) <= self.most
            and names <= self._by_name
            and names.isdisjoint(filled)
            and not self._required.difference(filled, names)
        )


#: Annotations that no task has: the parameter is one of the call's own.
_PLAIN = frozenset({"int", "float", "str", "bytes", "bool", "list", "dict", "tuple", "set"})


def takes_task(function: Callable[..., Any]) -> bool:
    """Whether a function has a first positional parameter that may be the task."""
    signature = _signature(function)
    if signature is None:
        return True
    for one in signature.parameters.values():
        if one.kind is one.VAR_POSITIONAL:
            return True
        if one.kind not in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD):
            return False
        written = one.annotation if isinstance(one.annotation, str) else getattr(one.annotation, "__name__", "")
        return one.name == "self" or written.partition("[")[0] not in _PLAIN
    return False


def _signature(function: Callable[..., Any] | None) -> inspect.Signature | None:
    if function is None:
        return None
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None  # some functions written in C tell nothing


ANY = Parameters(None)
