"""Passwords in URLs of a Celery application: neither its settings as shown nor its report have them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from fastq.celery.worker.program import CeleryProgram
from fastq.errors import SettingsError

SECRET = "s3cret"


@pytest.mark.parametrize(
    "url", [f"amqp://user:{SECRET}@h", f"amqp://user:{SECRET}/x@h", f"amqp//user:{SECRET}@h", f"user:{SECRET}@h"]
)
def test_no_setting_shows_a_url_whole(url: str) -> None:
    settings: dict[str, Any] = {
        "broker_read_url": url,
        "broker_write_url": [url, url],
        "broker_transport_options": {"url": url, "deep": [{"er": f"x://:{SECRET}@h"}]},
        "result_backend_transport_options": {"proxy": f"http://user:{SECRET}@proxy"},
    }
    app = Celery("secret", broker=url, backend=f"redis://user:{SECRET}@h", set_as_current=False)
    app.conf.update(settings)
    program = CeleryProgram(app)
    try:
        shown = repr(program.configuration(with_defaults=False)) + program.report()
    except SettingsError as error:
        assert "/x" in url  # kombu cannot read it
        shown = f"{error!r} proxy"
    assert SECRET not in shown, [line for line in shown.splitlines() if SECRET in line]
    assert "proxy" in shown


@pytest.mark.parametrize("command", [["worker"], ["call", "x"], ["status"], ["purge", "-f"], ["report"], ["check"]])
def test_no_command_shows_a_url_that_it_cannot_read(command: list[str], tmp_path: Path) -> None:
    url = f"amqp://user:{SECRET}/x@127.0.0.1:1//"
    (tmp_path / "tasks.py").write_text(f"from celery import Celery\napp = Celery('secret', broker={url!r})\n")
    done = subprocess.run(
        [sys.executable, "-m", "fastq", "-A", "tasks", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode
    assert SECRET not in done.stdout + done.stderr
    assert "user:**@" in done.stdout + done.stderr
