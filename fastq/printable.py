"""Text from outside, as it may stand in a line of a log or on a terminal. What is written where is not decided here."""

from __future__ import annotations

import re

#: Chosen: of one value; what is longer is cut.
MAX_SHOWN = 4096

#: What ends a line, commands a terminal, turns the direction of writing, or cannot be encoded.
_CONTROL = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_IN_A_LINE = re.compile(f"[\t\n{_CONTROL}]")
_IN_LINES = re.compile(f"[{_CONTROL}]")


class Lines(str):
    """Text of several lines that are to stay lines, such as a traceback."""

    __slots__ = ()


def cut(text: str, limit: int = MAX_SHOWN) -> str:
    """Return the text, or its beginning with three dots when it is longer than the limit."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: str, limit: int = MAX_SHOWN) -> str:
    """Return the text in one line, control characters as Python writes them (``\\n``, ``\\x1b``), cut to the limit."""
    text = cut(text, limit)
    return text if text.isprintable() else _IN_A_LINE.sub(_escaped, text)


def printable_lines(text: str) -> str:
    """Return the text with its lines and tabs, other control characters as Python writes them."""
    return _IN_LINES.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
