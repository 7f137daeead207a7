"""Patterns of remote control: what Python's matcher says of them, in a bounded number of steps."""

from __future__ import annotations

import contextlib
import random
import re
import time
import warnings

import pytest

from fastq.bus.patterns import PatternRefused, matches

PIECES = [
    *("a", "b", ".", "[ab]", "[^a]", "[]]", "(", "(?:", "(?P<x>", ")", "|", "*", "+", "?", "{2}", "{1,2}", "{,2}"),
    *(
        "{1,}",
        "*?",
        "+?",
        "??",
        "^",
        "$",
        r"\b",
        r"\B",
        r"\w",
        r"\d",
        r"\.",
        r"\A",
        r"\Z",
        "{",
        "}",
        "]",
        "@",
        "-",
        "1",
    ),
]


def test_a_pattern_means_what_it_means_to_python() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    compared = refused = 0
    for _ in range(20_000):
        pattern = "".join(generator.choices(PIECES, k=generator.randrange(1, 9)))
        name = "".join(generator.choices("ab@1.\n", k=generator.randrange(7)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = re.match(pattern, name) is not None
            except re.error:
                continue
            try:
                assert matches(pattern, "pcre", name) is expected, (pattern, name)
                compared += 1
            except PatternRefused:
                refused += 1
    assert compared > 5000
    assert refused < compared / 50  # "a*+" and the like, which older versions of Python do not read either


@pytest.mark.parametrize(
    "pattern",
    ["(|)" * 40 + "!", "(a*)*b", "((a*)*)*" * 10 + "b", "(((a*)*)*|((a*)*)*)*" * 8 + "!", "((){65535}){65535}!",
     "(a|a)*b", "a?" * 60 + "a" * 60, "(" * 127 + ")" * 127 + "!", "[\0-\U0010ffff]" * 50, "x*(.|..)*" * 10 + "!",
     "a{1,50}" * 5],
)  # fmt: skip
def test_no_pattern_takes_long(pattern: str) -> None:
    began = time.process_time()
    with contextlib.suppress(PatternRefused):
        matches(pattern, "pcre", "a" * 1000)
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize(
    "pattern",
    ["(", ")", "a)", "a**", "*a", "{2}a", "a{2}{3}", "a{3,2}", "[a", "[b-a]", r"(a)\1", "(?=a)", "(?i)a", "a{257}",
     "a" * 256, r"\q", "\\"],
)  # fmt: skip
def test_what_is_not_read_is_refused(pattern: str) -> None:
    with pytest.raises(PatternRefused, match="pattern"):
        matches(pattern, "pcre", "a@b")


@pytest.mark.parametrize(
    ("pattern", "expected"), [("a@*", True), ("*@b", True), ("?@?", True), ("a@", False), ("[!a]@b", False)]
)
def test_a_glob_matches_a_whole_name(pattern: str, expected: bool) -> None:
    assert matches(pattern, "glob", "a@b") is expected
