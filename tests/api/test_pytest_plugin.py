"""The fixtures that users' tests get, and what loading them costs."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module

import pytest

from tests import ROOT

pytest_plugins = ["pytester"]

#: What the plugin may add to every start of pytest, import of ``fastq`` included; the best of some.
COST_MS = 5.0


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> object:
    """Return a function that runs a text as a test file with the plugin, and no other that is installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def start(text: str, conftest: str = "") -> pytest.RunResult:
        pytester.makeconftest(conftest)
        pytester.makepyfile(text)
        return pytester.runpytest_subprocess("-p", "fastq.pytest_plugin", "-W", "error")

    return start


def test_it_is_an_entry_point() -> None:
    found = re.search(r'entry-points\.pytest11\]\nfastq = "(\S+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    assert import_module(found[1]).fastq_worker


def test_a_test_without_servers(run: object) -> None:
    done = run(  # type: ignore[operator]
        """
        import os

        def test_it(fastq_app):
            from fastq.testing import worker
            pid = fastq_app.task(name="pid")(os.getpid)
            with worker(fastq_app):
                assert pid.delay().get(timeout=20) == os.getpid()
        """
    )
    done.assert_outcomes(passed=1)


def test_an_application_of_ones_own_with_options(run: object) -> None:
    done = run(  # type: ignore[operator]
        """
        import os
        from shop import app, pid

        def test_it_runs(fastq_worker):
            assert pid.delay().get(timeout=20) == os.getpid()
            assert fastq_worker.options.time_limit == 7

        def test_eager(fastq_eager):
            assert fastq_eager is app
            assert type(pid.delay()).__name__ == "EagerResult"

        def test_not_eager_afterwards(fastq_app):
            assert type(pid.delay()).__name__ == "AsyncResult"
        """,
        """
        import pytest, sys, types
        from fastq import FastQ

        app = FastQ("shop", broker="amqp://nowhere.invalid", backend="rpc://")
        pid = app.task(name="pid")(__import__("os").getpid)
        shop = sys.modules["shop"] = types.ModuleType("shop")
        shop.app, shop.pid = app, pid

        @pytest.fixture
        def fastq_app():
            with app.override(broker_url="memory://", result_backend="memory://"):
                yield app

        @pytest.fixture
        def fastq_worker_options():
            return {"time_limit": 7}
        """,
    )
    done.assert_outcomes(passed=3)


def test_a_celery_application(run: object) -> None:
    done = run(  # type: ignore[operator]
        """
        import os
        from shop import app, pid

        def test_it_runs(fastq_worker):
            assert pid.delay().get(timeout=20) == os.getpid()

        def test_eager(fastq_eager):
            assert type(pid.delay()).__name__ == "EagerResult"

        def test_not_eager_afterwards(fastq_app):
            assert type(pid.delay()).__name__ == "AsyncResult"
        """,
        """
        import os, pytest, sys, types
        from celery import Celery

        app = Celery("shop", broker="memory://", backend="cache+memory://")

        @app.task
        def pid():
            return os.getpid()

        shop = sys.modules["shop"] = types.ModuleType("shop")
        shop.app, shop.pid = app, pid

        @pytest.fixture
        def fastq_app():
            return app
        """,
    )
    done.assert_outcomes(passed=3)


def test_it_costs_a_run_of_pytest_next_to_nothing() -> None:
    code = (
        "import pytest, sys, time\n"
        "began = time.thread_time()\n"
        "import fastq.pytest_plugin\n"
        "print((time.thread_time() - began) * 1000, *(name for name in sys.modules if name.startswith('fastq')))"
    )
    command = [sys.executable, "-c", code]
    done = [subprocess.check_output(command, text=True, cwd=ROOT).split() for _ in range(5)]
    assert {*done[0][1:]} == {"fastq", "fastq.version", "fastq.pytest_plugin"}
    took = min(float(each[0]) for each in done)
    print(f"{took:.2f} ms")
    assert took < COST_MS
