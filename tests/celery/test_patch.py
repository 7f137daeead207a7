"""``fastq.patch()``: a program that starts Celery's worker by itself runs fastq's, and ends as it did before."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import celery
import pytest
import redis

from fastq.celery.cli.patch import command_of, words_of
from tests.support.servers import Redis, wait_until
from tests.support.worker_process import ROOT

pytestmark = pytest.mark.redis

PROGRAM = """
import sys
import click
if sys.argv[1] == "patched":
    import fastq
    fastq.patch()
    fastq.patch()
import celery

app = celery.Celery("script", broker="{url}", backend="{url}")
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_redirect_stdouts = False
made_here = object()

@app.task(name="same")
def same():
    return app is celery.current_app._get_current_object() and made_here is not None and __name__

def run(how, *words):
    if how == "worker_main":
        return app.worker_main(["worker", "-c1", "-l", "INFO", "--without-mingle", *words])
    if how == "start":
        return app.start(["-q", "worker", "-c1", "-l", "INFO", "--without-mingle", *words])
    if how == "nothing":
        return app.worker_main(["report"])
    worker = app.Worker(concurrency=1, loglevel="INFO", without_mingle=True, hostname="w1@here", queues=["celery"])
    worker.start()
    return "exit code", worker.exitcode

if __name__ == "__main__":
    if "away" in sys.argv:
        sys.argv.remove("away")
        app.conf.update(
            broker_url="redis://127.0.0.1:1/0",
            broker_connection_retry=False,
            broker_connection_retry_on_startup=False,
        )
    try:
        print("returned", run(*sys.argv[2:]))
    except (click.ClickException, ValueError) as error:
        print("raised", type(error).__name__)
"""


class Script:
    """The program in a process of its own."""

    def __init__(self, folder: Path, url: str, *arguments: str) -> None:
        self.file = folder / "out.txt"
        (folder / "script.py").write_text(PROGRAM.format(url=url), encoding="utf-8")
        with self.file.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "script.py", *arguments],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
                stdout=out,
                stderr=out,
            )

    def output(self) -> str:
        return self.file.read_text(encoding="utf-8")

    def wait_for(self, pattern: str) -> None:
        wait_until(lambda: bool(re.search(pattern, self.output())), 30, lambda: AssertionError(self.output()))

    def end(self) -> tuple[int, str]:
        """Return the exit code and what the program said last."""
        try:
            code = self.process.wait(30)
        finally:
            self.process.kill()
        said = re.findall(r"^(?:returned|raised) .*", self.output(), re.M)
        assert said, self.output()
        return code, said[-1]


@pytest.fixture
def url(redis_server: Redis) -> str:
    """An empty database."""
    url = redis_server.url(5)
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def script(tmp_path: Path, url: str) -> Iterator[Callable[..., Script]]:
    """A function that starts the program; it is killed afterwards."""
    started: list[Script] = []

    def start(*arguments: str) -> Script:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Script(folder, url, *arguments))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


def ended(script: Callable[..., Script], url: str, program: str, way: str, number: signal.Signals) -> tuple[int, str]:
    """Return how a worker ends that was started in a way and then sent a signal."""
    for attempt in range(3):
        running = script(program, way)
        running.wait_for(r"ready\.")
        with celery.Celery("client", broker=url, backend=url, set_as_current=False) as client:
            assert client.send_task("same").get(timeout=20) == "__main__"
        running.process.send_signal(number)
        try:
            end = running.end()
        except subprocess.TimeoutExpired:
            # Celery's own cold stop hangs now and then.
            if program == "patched" or attempt == 2:
                raise
            running.process.kill()
            continue
        assert ("[config]" in running.output()) == (way != "start")  # -q stands before the command
        assert program == "plain" or " v0." in running.output() or way == "start"
        return end
    raise AssertionError("not reached")


@pytest.mark.parametrize("way", ["worker_main", "start", "Worker"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT], ids=["warm", "cold"])
def test_a_worker_runs_with_this_very_application_and_ends_as_celery_s(
    script: Callable[..., Script], url: str, way: str, number: signal.Signals
) -> None:
    ends = [ended(script, url, program, way, number) for program in ("plain", "patched")]
    if way == "Worker" and number == signal.SIGQUIT:
        # Celery leaves the code of a cold stop unset; ours says that it was one.
        assert ends == [(0, "returned ('exit code', None)"), (0, "returned ('exit code', 1)")]
    else:
        assert ends[1] == ends[0]


THREAD = """
import os, signal, sys, threading, time
import fastq
fastq.patch()
import celery

app = celery.Celery("script", broker="{url}", backend="{url}")
app.conf.update(broker_connection_retry_on_startup=True, worker_redirect_stdouts=False)

@app.task(name="same")
def same():
    return __name__

def ask(result):
    return result.get(timeout=40)

if __name__ == "__main__":
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append("TERM"))
    how = sys.argv[1]
    worker = app.Worker(concurrency=1, loglevel="INFO", without_mingle=True, hostname="w1@here")
    if how == "early":
        worker.stop()
    words = ["worker", "-c1", "--without-mingle"]
    target = (lambda: app.worker_main(words)) if how == "worker_main" else worker.start
    thread = threading.Thread(target=target)
    thread.start()
    if how != "early":
        print("got", same.delay().get(timeout=40), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        print("heard", heard, thread.is_alive(), flush=True)
        if how == "worker_main":
            app.control.shutdown()
        else:
            getattr(worker, how)()
    thread.join(30)
    print("ended", not thread.is_alive(), worker.exitcode, flush=True)
"""


@pytest.mark.parametrize(("how", "code"), [("worker_main", None), ("stop", 0), ("terminate", 1), ("early", 0)])
def test_a_worker_in_a_thread_leaves_signals_alone_and_can_be_stopped(
    redis_server: Redis, tmp_path: Path, how: str, code: int | None
) -> None:
    url = redis_server.url(3)
    redis.Redis.from_url(url).flushdb()
    (tmp_path / "threaded.py").write_text(THREAD.format(url=url), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "threaded.py", how],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("got", "heard", "ended"))]
    began = [] if how == "early" else ["got __main__", "heard ['TERM'] True"]
    assert lines == [*began, f"ended True {code}"], done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["worker_main", "--bogus"], "raised NoSuchOption"),
        (["nothing"], "raised ValueError"),
        (["worker_main", "away"], "returned None"),
    ],
    ids=["wrong option", "another command", "no broker"],
)
def test_what_goes_wrong_ends_as_with_celery(script: Callable[..., Script], arguments: list[str], said: str) -> None:
    for program in ("plain", "patched"):
        assert script(program, *arguments).end() == (0, said)


def test_the_command_is_the_first_word_that_is_none_of_an_option_s() -> None:
    assert command_of(["-A", "worker", "--workdir", "beat", "-q", "-b=x", "report", "worker"]) == "report"
    assert command_of(["-q", "worker", "-A"]) == "worker"
    assert command_of(["-A"]) == ""


def test_keywords_become_a_command_line() -> None:
    options = {"loglevel": 20, "queues": ["a", "b"], "purge": True, "detach": None, "quiet": True, "hostname": "w@%h"}
    assert words_of(options) == (["-q"], ["--loglevel=INFO", "--queues=a,b", "--discard", "--hostname=w@%%h"])
    assert words_of({"pool_cls": "solo", "task_events": False}) == ([], ["--pool", "solo"])
    with pytest.raises(TypeError, match="has no keyword 'ready_callback'"):
        words_of({"ready_callback": print})


def test_importing_fastq_does_not_import_celery() -> None:
    code = "import sys, fastq; print('celery' in sys.modules, 'patch' in dir(fastq))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
