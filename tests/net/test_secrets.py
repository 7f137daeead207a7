"""Passwords in URLs: no output shows them, however the URL is written, and no list of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastq import FastQ
from fastq.cli import run
from fastq.errors import FastqError
from fastq.net.urls import mask_text, mask_url
from fastq.pool.titles import active
from fastq.worker.report import configuration, report_text

SECRET = "s3cret"
#: Nothing listens on port 1; most of these are no URLs at all.
URLS = [
    f"{scheme}{separator}{user}:{password}@127.0.0.1:1/0"
    for scheme, separator in (("amqp", "://"), ("redis", "://"), ("sentinel", "://"), ("amqp", "//"), ("redis", ":/"))
    for user, password in (
        ("user", SECRET),
        ("user", f"{SECRET}/x"),
        ("user", f"x/{SECRET}"),
        ("", f"1#{SECRET}"),
        ("user", f"1?{SECRET}"),
        ("user", f"1?x={SECRET}/@"),
        ("user", f"[{SECRET}]"),
    )
] + [
    f"user:{SECRET}@127.0.0.1",
    f"user:{SECRET}@127.0.0.1:1/x",
    f"amqp://127.0.0.1:1/;amqp://user:{SECRET}/x@127.0.0.1:1//",
    f"amqp://127.0.0.1:1/;user:{SECRET}@127.0.0.1",
    f"carrier-pigeon://user:{SECRET}@coop",
    f"amqp://user@127.0.0.1:1/?password={SECRET}",
]


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """The command line tells Celery of its options by the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_never_shown_whole(
    url: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTQ_DEBUG_TRACEBACK", "1")
    before = ["-b", url, "--result-backend", url]
    for words in (["call", "x"], ["status", "-t", "0.1"], ["purge", "-f"], ["result", "1"], ["report"]):
        run([*before, *words])
        run([*words[:1], "-b", url])
    app = FastQ("secret", broker=url, backend=url, broker_connection_timeout=0.2, fastq_publish_timeout=0.2)
    for use in (lambda: app.send_task("x"), lambda: app.store.load("x")):
        try:
            use()
        except FastqError as error:
            print(repr(error), error)
    app.close()
    shown = "".join(capfd.readouterr()) + mask_url(url)
    assert SECRET not in shown, [line for line in shown.splitlines() if SECRET in line]


@pytest.mark.parametrize("url", [URLS[1], URLS[4], f"amqp//user:{SECRET}@127.0.0.1"])
def test_a_worker_shows_no_url_whole(url: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text("from fastq import FastQ\napp = FastQ('secret')\n")
    worker = subprocess.run(
        [sys.executable, "-m", "fastq", "-A", "tasks", "worker", "-l", "DEBUG"],
        cwd=tmp_path,
        env={**os.environ, "FASTQ_BROKER_URL": url, "FASTQ_RESULT_BACKEND": url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert worker.returncode
    assert "Error: " in worker.stderr
    assert SECRET not in worker.stdout + worker.stderr


def test_no_setting_shows_a_url_whole() -> None:
    app = FastQ(
        "secret",
        broker=[f"amqp://user:{SECRET}@a", f"amqp://user:{SECRET}@b"],
        broker_transport_options={"url": f"redis://user:{SECRET}/x@h", "deep": [{"er": f"x://:{SECRET}@h"}]},
        result_backend_transport_options={"proxy": f"http://user:{SECRET}@proxy", "text": f"see (a://b:{SECRET}@c)"},
        result_backend=f"user:{SECRET}@h",
    )
    app.finalize()
    shown = repr(configuration(app.conf)) + report_text(app.conf)
    assert SECRET not in shown
    assert "user:**@a" in shown
    assert "http://user:**@proxy" in shown


def test_a_text_with_urls_keeps_all_but_their_passwords() -> None:
    text = f"'a://u:{SECRET}/@h/p?x=1', then b://:{SECRET}@h; c://u@h d://h:80/x mail@h 10:20@x"
    assert mask_text(text) == "'a://u:**@h/p?x=1', then b://:**@h; c://u@h d://h:80/x mail@h 10:20@x"


def test_a_title_shows_no_url_whole() -> None:
    words = [
        "-b",
        f"amqp://u:{SECRET}@h",
        f"--broker=u:{SECRET}@h",
        f"--result-backend=redis://:{SECRET}@h",
        "-n",
        "w@h",
    ]
    assert active(words) == "-active- (-b amqp://u:**@h --broker=u:**@h --result-backend=redis://:**@h -n w@h)"


def test_a_url_may_stand_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The list of processes shows the command line to everybody."""
    database = f"sqlite:///{tmp_path / 'there.db'}"
    (tmp_path / "url").write_text(f"{database}\n")
    with FastQ("maker", broker=database).batch():
        pass
    assert run(["-b", f"@{tmp_path / 'url'}", "call", "x"]) == 0
    assert (tmp_path / "there.db").exists()
    assert run(["-b", f"@{tmp_path / 'none'}", "call", "x"]) == 2
    assert "none" in capsys.readouterr().err
