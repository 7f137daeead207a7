"""The examples do what they say."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from examples.quickstart import progress
from tests import ROOT


def test_the_quickstart_checks_every_result_and_stops_its_worker() -> None:
    command = [sys.executable, "-m", "examples.quickstart"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"10,000 tasks sent, run and checked in .* tasks/s", done.stdout)
    assert re.search(r"300 round trips one by one: p50 .* ms, p99 .* ms", done.stdout)
    assert "add.delay(2, 3).get() -> 5" in done.stdout
    assert done.stdout.rstrip().endswith("worker stopped by SIGTERM, exit code 0")


def test_the_progress_is_shown_by_quarters_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    items = range(0, 10_000, 500)
    assert list(progress(items, "sent", 500)) == list(items)
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["2,500/10,000", "5,000/10,000", "7,500/10,000", "10,000/10,000"]
