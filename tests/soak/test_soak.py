"""The soak of `ci/soak`, for less than a minute: that it works, and that nothing is lost or grows at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.soak.growth import Series
from tests.support.worker_process import ROOT

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]


@pytest.mark.timeout(600)
def test_a_short_soak_loses_nothing_and_leaves_nothing() -> None:
    command = [sys.executable, "-m", "tests.soak", "0.75", "--rate", "200", "--every", "5"]
    soak = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540, check=False)
    print(soak.stdout, soak.stderr)  # with the seed
    assert soak.returncode == 0, soak.stdout + soak.stderr
    assert soak.stdout.count("| **lost** | 0 | 0 | 0 | 0 |") == 1


@pytest.mark.parametrize(
    ("values", "is_flat"),
    [([50.0] * 40, True), ([50 + n % 5 for n in range(40)], True), ([50 + n / 10 for n in range(40)], False)],
    ids=["flat", "unsteady", "rising"],
)
def test_what_rises_is_told_from_what_is_unsteady(values: list[float], is_flat: bool) -> None:
    series = Series("memory", "MiB", 2.0, [(n * 3.0, value) for n, value in enumerate(values)])
    assert series.is_flat(30.0) is is_flat
