"""Exceptions that tasks of the application raise, each awkward in its own way."""

from __future__ import annotations


class PlainError(Exception):
    """Nothing special."""


class TwoArguments(Exception):
    """Rebuilt from its arguments."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text


class HidesArguments(Exception):
    """Takes an argument, but has none by which it could be rebuilt."""

    def __init__(self, needed: int) -> None:
        super().__init__()
        self.needed = needed


class Expected(Exception):
    """Named in a task's `throws`."""
