"""No message and no command holds a worker: a running one goes on, within a bound of time and of memory.

Malformed messages are in ``tests.test_malformed``; these are well-formed ones that would cost too much to read.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attacked import NODE, Attacked, Program
from tests.servers import wait_until
from tests.stage import Kind, open_stage

pytestmark = pytest.mark.rabbitmq

#: On a loaded machine; what these tests are about took from minutes to for ever.
SOON_S = 10.0
TARGETS: list[tuple[Kind, Program]] = [
    ("amqp", "fastq"), ("amqp", "celery"), ("redis", "fastq"), ("redis", "celery"),
]  # fmt: skip
YAML = "application/x-yaml"


@pytest.fixture(scope="module", params=TARGETS, ids="-".join)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    """A worker with one child that holds 1,000 messages with an ETA and more."""
    kind, program = request.param
    stage = open_stage(kind, request, tmp_path_factory.mktemp(f"hostile-{kind}-{program}"))
    attacked = Attacked(stage, program, children=1, accept_content=["json", "yaml"])
    yield attacked
    attacked.close()
    stage.close()


def log_since(target: Attacked, size: int, text: str) -> None:
    """Return when the log has the text in what was written after its first ``size`` characters."""
    wait_until(
        lambda: text in target.worker.log()[size:],
        SOON_S,
        lambda: AssertionError(f"no {text!r} in {target.worker.log()[size:]}"),
    )


# --- patterns of remote control

PATTERNS = [
    ("pcre", "(|)" * 40 + "!"),
    ("pcre", "(a*)*" * 20 + "!"),
    ("pcre", "((){65535}){65535}!"),
    ("pcre", "(?=(.*)*!)"),
    ("pcre", ".*.*.*.*.*.*.*.*.*!"),
    ("pcre", "(?i)" + "[\0-\U0010ffff]" * 40),
    ("glob", "*a" * 100 + "!"),
    ("glob", "*?" * 100 + "!"),
    ("glob", "*[!a]" * 40 + "!"),
]


@pytest.mark.parametrize(("matcher", "pattern"), PATTERNS)
def test_no_pattern_holds_the_worker(target: Attacked, matcher: str, pattern: str) -> None:
    with target.memory_bound(20):
        for _ in range(5):
            target.bus.tell("ping", {}, pattern=pattern, matcher=matcher)
        assert target.ask("ping") == {"ok": "pong"}
        assert target.send_good(SOON_S) < SOON_S
    target.check_alive()


@pytest.mark.parametrize("pattern", [r"(\w+)@\1", "(?=a)", "a{9999}", "(", "a**", "x" * 300])
def test_who_sends_a_pattern_that_is_not_read_is_told(target: Attacked, pattern: str) -> None:
    before = len(target.worker.log())
    replies = list(target.bus.ask("ping", {}, 1.0, pattern=pattern, matcher="pcre"))
    [(node, reply)] = replies
    assert node == NODE
    assert "pattern" in reply["error"]
    log_since(target, before, "remote control: ping is not run: ")
    assert list(target.bus.ask("ping", {}, 1.0, pattern="(attacked|other)@[a-z]{1,9}$", matcher="pcre"))
