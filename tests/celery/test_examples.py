"""The Celery examples print the same under either worker."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.celery.conftest import RUNNERS
from tests.support.servers import Redis
from tests.support.worker_process import Program

pytestmark = pytest.mark.redis

PRINTED = {
    "celery_canvas": """\
chain       10
group       [0, 2, 4, 6, 8]
chord       90
all of them [2, 3, 4] then 109
callback    42
errback     divide failed: division by zero
retry       done at attempt 3
replace     3628800
failed step ZeroDivisionError
""",
    "celery_flask": """\
POST /add         -> {'ready': True, 'successful': True, 'value': 5}
POST /greet/world -> {'ready': True, 'successful': True, 'value': 'Hello, world'}
POST /fail        -> {'ready': True, 'successful': False, 'value': "RuntimeError('in examples.celery_flask')"}
""",
    "celery_django": """\
ordered book: number 1
ordered lamp: number 2
ordered chair: number 3
ordered book again: IntegrityError
turnover: 43500
result  .tasks.order  FAILURE  {"exc_type": "IntegrityError", "exc_message": ["UNIQUE constraint failed: \
shop_order.article"], "exc_module": "django.db.utils"}
result  .tasks.order  SUCCESS  1
result  .tasks.order  SUCCESS  2
result  .tasks.order  SUCCESS  3
result  .tasks.turnover  SUCCESS  43500
schedule: report: every second
reports: [43500]
""",
}


def run(example: str, runner: Program, *options: str) -> str:
    """Return what the example printed; fail when it printed errors or ended badly."""
    command = [sys.executable, "-m", f"examples.{example}", "--with", runner, *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "EXAMPLE_"))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("runner", [pytest.param(runner, id=f"under_{runner}") for runner in RUNNERS])
@pytest.mark.parametrize("example", PRINTED)
def test_an_example_prints_the_same_under_either_worker(example: str, runner: Program, redis_server: Redis) -> None:
    assert run(example, runner, "--broker", redis_server.url(14)) == PRINTED[example]


@pytest.mark.parametrize("runner", [pytest.param(runner, id=f"under_{runner}") for runner in RUNNERS])
def test_an_example_starts_a_broker_of_its_own(runner: Program) -> None:
    assert run("celery_flask", runner) == PRINTED["celery_flask"]
