"""What registers itself with ``net.forks`` is told of forks: in order, whoever made it, whatever another one raises."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from fastq.net import forks
from tests import ROOT
from tests.support.conformance import in_child


class Thing:
    """Says in a list that it was told."""

    def __init__(self, name: str, told: list[str]) -> None:
        self._name = name
        self._told = told
        forks.register(self)

    def __repr__(self) -> str:
        return f"<thing {self._name}>"

    def after_fork(self) -> None:
        self._told.append(self._name)
        if self._name == "bad":
            raise KeyboardInterrupt


@pytest.fixture
def told() -> Iterator[list[str]]:
    yield []
    gc.collect()


def test_all_are_told_in_the_child_oldest_first_and_the_dropped_no_more(told: list[str]) -> None:
    things = [Thing(name, told) for name in "dcba"]
    del things[1]
    gc.collect()
    assert in_child(lambda: told) == "returned ['d', 'b', 'a']"
    assert told == []


def test_one_that_fails_keeps_none_from_being_told(told: list[str], caplog: pytest.LogCaptureFixture) -> None:
    things = [Thing(name, told) for name in ("first", "bad", "last")]
    with caplog.at_level(logging.ERROR, "fastq.forks"):
        assert in_child(lambda: told) == "returned ['first', 'bad', 'last']"
        assert in_child(lambda: caplog.messages[-1].startswith(f"{things[1]!r} may still use")) == "returned True"


def test_what_threads_make_and_drop_while_others_fork_is_told(told: list[str]) -> None:
    done = threading.Event()
    kept: list[Thing] = []

    def churn() -> None:
        while not done.is_set():
            kept.append(Thing("kept", told))
            Thing("dropped", told)
            time.sleep(0.0001)

    threads = [threading.Thread(target=churn) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        while not kept:
            time.sleep(0.001)
        answers = [in_child(lambda: told.count("kept") > 0) for _ in range(20)]
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert answers == ["returned True"] * 20


def test_a_child_of_a_child_is_told_too(told: list[str]) -> None:
    thing = Thing("it", told)
    assert in_child(lambda: in_child(lambda: told)).endswith("['it', 'it']\"")
    assert thing


UWSGI = """
import ctypes, os, sys, types
uwsgi = sys.modules["uwsgi"] = types.ModuleType("uwsgi")
told = []
SETUP

from fastq.net import forks
class Thing:
    def after_fork(self):
        told.append("thing")
thing = Thing()
forks.register(thing)
hook = uwsgi.post_fork_hook
hook()
assert told == EARLIER, told  # in a process that was not forked
told.clear()

if FORK == 0:
    hook()
    os._exit(0 if told == ["thing", *EARLIER] else 1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""
EARLIER = """
uwsgi.post_fork_hook = lambda: told.append("earlier")
sys.modules["uwsgidecorators"] = None
"""
DECORATORS = """
decorators = sys.modules["uwsgidecorators"] = types.ModuleType("uwsgidecorators")
decorators.postfork = lambda function: setattr(uwsgi, "post_fork_hook", function)
"""
UNTOLD = "ctypes.PyDLL(None).fork()"  # Python's hooks do not run


@pytest.mark.parametrize("fork", [UNTOLD, "os.fork()"], ids=["untold", "told"])
@pytest.mark.parametrize(("setup", "earlier"), [(EARLIER, ["earlier"]), (DECORATORS, [])], ids=["hook", "decorators"])
def test_uwsgi_tells_of_its_forks_and_once(setup: str, earlier: list[str], fork: str) -> None:
    code = UWSGI.replace("SETUP", setup).replace("EARLIER", repr(earlier)).replace("FORK", fork)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)
