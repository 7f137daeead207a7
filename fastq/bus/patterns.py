"""Which node names a remote control pattern matches, in a bounded number of steps whatever the pattern. No I/O.

Python's own matcher tries one way after the other, so thirty characters can keep it busy for ever, and nothing can
interrupt it. Here all ways are followed at once, a character of the name at a time. What cannot be matched like that
(references, conditions, looking ahead or behind) is refused. Source: Thompson, "Regular Expression Search Algorithm"
(1968), in Pike's form of a program that splits and jumps.
"""

from __future__ import annotations

import fnmatch
import re
from typing import Final, TypeAlias

from fastq.errors import DecodeError

#: Chosen: host names are shorter.
MAX_CHARACTERS: Final = 255
#: Chosen: fifty words or numbers; so many steps take 60 ms at worst, measured with the longest name.
_MAX_STEPS: Final = 256

#: One character, a set, or a place (start, end, edge of a word): what Python's matcher does at a glance. The numbers
#: of escapes are left out: they are references, or too rare.
_ATOM: Final = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]|\\[^0-9xuUN]|[^\[\\]", re.DOTALL)
_GROUP: Final = re.compile(r"\((?:\?:|\?P<\w+>|(?!\?))")
_REPEAT: Final = re.compile(r"(?:([*+?])|\{(?=[\d,])(\d{0,5})(,?)(\d{0,5})\})\??")

#: What to do at one place of a pattern: an atom, or how far to jump, to one or two places.
Step: TypeAlias = "re.Pattern[str] | tuple[int, ...]"


class PatternRefused(DecodeError):
    """A pattern that is not read."""


def matches(pattern: str, matcher: str, name: str) -> bool:
    """Return whether a pattern matches a name: ``glob`` the whole of it, ``pcre`` its beginning.

    Raises PatternRefused for a pattern that is none, or that cannot be matched in a bounded time.
    """
    if len(pattern) > MAX_CHARACTERS:
        raise PatternRefused(f"a pattern of {len(pattern)} characters; {MAX_CHARACTERS} are read")
    name = name[:MAX_CHARACTERS]
    if matcher == "glob":
        # Takes each star's shortest way and never looks back. Not by fnmatch's own cache, which has room for 32,768.
        return re.match(fnmatch.translate(pattern), name) is not None
    return matcher == "pcre" and _run(_compile(pattern), name)


def _run(steps: list[Step], name: str) -> bool:
    """Return whether the end of the program can be reached."""
    places = [0]
    for at in range(len(name) + 1):
        seen: set[int] = set()
        following: list[int] = []
        while places:
            place = places.pop()
            if place == len(steps):
                return True
            if place in seen:
                continue
            seen.add(place)
            step = steps[place]
            if isinstance(step, tuple):
                places.extend(place + distance for distance in step)
            elif found := step.match(name, at):
                (following if found.end() > at else places).append(place + 1)
        places = following
    return False


def _compile(pattern: str) -> list[Step]:
    try:
        steps, end = _alternatives(pattern, 0)
    except (re.error, Warning) as error:
        raise PatternRefused(f"the pattern {pattern!r} is none: {error}") from None
    if end < len(pattern):
        raise _refused(pattern, end)
    return steps


def _alternatives(pattern: str, at: int) -> tuple[list[Step], int]:
    """Return the program of what stands between here and the end of the group, and where that is."""
    steps, at = _sequence(pattern, at)
    while pattern[at : at + 1] == "|":
        other, at = _sequence(pattern, at + 1)
        steps = [(1, len(steps) + 2), *steps, (len(other) + 1,), *other]
    return steps, at


def _sequence(pattern: str, at: int) -> tuple[list[Step], int]:
    steps: list[Step] = []
    while at < len(pattern) and pattern[at] not in "|)":
        part: list[Step]
        if _REPEAT.match(pattern, at):
            raise _refused(pattern, at)
        if group := _GROUP.match(pattern, at):
            part, at = _alternatives(pattern, group.end())
            if pattern[at : at + 1] != ")":
                raise _refused(pattern, at)
            at += 1
        elif pattern[at] != "(" and (atom := _ATOM.match(pattern, at)):
            part, at = [re.compile(atom[0], re.DOTALL if atom[0] != "." else 0)], atom.end()
        else:
            raise _refused(pattern, at)
        if repeat := _REPEAT.match(pattern, at):
            part, at = _repeated(part, pattern, repeat), repeat.end()
        steps += part
        if len(steps) > _MAX_STEPS:
            raise PatternRefused(f"the pattern {pattern!r} takes more than {_MAX_STEPS} steps")
    return steps, at


def _repeated(part: list[Step], pattern: str, repeat: re.Match[str]) -> list[Step]:
    sign, least, comma, most = repeat.groups()
    if sign:
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
    else:
        low = int(least or 0)
        high = (int(most) if most else None) if comma else low
    if high is not None and high < low:
        raise PatternRefused(f"the pattern {pattern!r} repeats at least {low} and at most {high} times")
    if len(part) * max(low, high or 1) > _MAX_STEPS:
        raise PatternRefused(f"the pattern {pattern!r} takes more than {_MAX_STEPS} steps")
    optional: list[Step] = [(1, len(part) + 1), *part]
    if high is None:
        return [*part * low, (1, len(part) + 2), *part, (-len(part) - 1,)]
    return [*part * low, *optional * (high - low)]


def _refused(pattern: str, at: int) -> PatternRefused:
    return PatternRefused(f"the pattern {pattern!r} is not read from its character {at + 1} on: {pattern[at:][:20]!r}")
