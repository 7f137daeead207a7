"""Style, types and Cython lint run as tests, so that one command tells the truth."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig

import pytest

from tests import ROOT

PYTHON_FOLDERS = ("fastq", "tests", "bench", "examples", "setup.py")


def run(tool: str, *arguments: str) -> None:
    """Run a tool of this interpreter's environment in the project's folder and fail with what it printed."""
    scripts = sysconfig.get_path("scripts")
    program = shutil.which(tool, path=scripts)
    if program is None and os.environ.get("CI") != "true":
        pytest.skip(f"{tool} is not installed: pip install '.[test]'")
    assert program is not None, f"{tool} is not installed: pip install '.[test]'"
    # cython-lint looks for pycodestyle on PATH.
    environment = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")])}
    command = [program, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join([tool, *arguments])}\n{done.stdout}{done.stderr}", pytrace=False)


def test_ruff_finds_nothing() -> None:
    run("ruff", "check", "--quiet", *PYTHON_FOLDERS)


def test_the_code_is_formatted() -> None:
    run("ruff", "format", "--check", "--quiet", *PYTHON_FOLDERS)


def test_mypy_finds_nothing() -> None:
    run("mypy", "--no-error-summary")


def test_cython_lint_finds_nothing() -> None:
    run("cython-lint", "fastq")
