"""Types: mypy --strict accepts the package and typing/ok.py, and refuses each marked line of typing/fail.py."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests import ROOT

FOLDER = Path(__file__).resolve().parent / "typing"
ERROR = re.compile(r"^(?P<file>[^:]+):(?P<line>\d+): error: (?P<words>.*)$", re.M)


def errors(*arguments: str) -> list[tuple[str, int, str]]:
    """Run mypy --strict and return its errors as (file name, line, words)."""
    mypy = shutil.which("mypy", path=sysconfig.get_path("scripts"))
    if mypy is None:
        pytest.skip("mypy is not installed: pip install '.[test]'")
    command = [mypy, "--strict", "--no-error-summary", "--hide-error-context", "--no-pretty", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [(Path(file).name, int(line), words) for file, line, words in ERROR.findall(done.stdout)]


@pytest.mark.slow
def test_the_package_passes() -> None:
    assert errors("-p", "fastq") == []


def test_what_users_write_passes() -> None:
    assert errors(str(FOLDER / "ok.py")) == []


def test_every_marked_line_is_refused_and_no_other() -> None:
    text = (FOLDER / "fail.py").read_text(encoding="utf-8")
    marked = {number for number, line in enumerate(text.splitlines(), 1) if line.endswith("# error")}
    found = errors(str(FOLDER / "fail.py"))
    assert {name for name, _, _ in found} == {"fail.py"}
    assert {line for _, line, _ in found} == marked, "\n".join(f"{line}: {words}" for _, line, words in found)
