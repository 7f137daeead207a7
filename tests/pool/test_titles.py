"""Processes of a FastQ application's worker as ``ps`` shows them; a Celery one's are in ``celery/test_records.py``."""

from __future__ import annotations

from collections.abc import Callable

import psutil

from tests.support.stage import until
from tests.support.worker_process import WorkerProcess

SOURCE = """
from fastq import FastQ

app = FastQ("shown", broker="sqlite:///fastq.db", backend="sqlite:///fastq.db")
"""


def test_titles_tell_main_process_zygote_and_children_apart(start_worker: Callable[..., WorkerProcess]) -> None:
    worker = start_worker("-c", "2", "-n", "w@h", source=SOURCE)
    main = psutil.Process(worker.pid)
    (zygote,) = main.children()

    def titles() -> list[str]:
        return sorted(" ".join(each.cmdline()).strip() for each in zygote.children())

    wanted = ["[fastq: w@h:ForkPoolWorker-1]", "[fastq: w@h:ForkPoolWorker-2]"]
    until(lambda: titles() == wanted, 10, "both children bear their names")
    assert " ".join(zygote.cmdline()).strip() == "[fastq: w@h:zygote]"
    until(lambda: " ".join(main.cmdline()).startswith("[fastq: w@h:MainProcess] -active- ("), 10, "it is active")
    assert " ".join(main.cmdline()).strip().endswith("-n w@h)")


def test_without_titles_names_tell_zygote_and_children_apart(start_worker: Callable[..., WorkerProcess]) -> None:
    """As where setproctitle is not installed."""
    worker = start_worker("-c", "2", source=SOURCE, env={"NOSETPS": "1"})
    main = psutil.Process(worker.pid)
    (zygote,) = main.children()
    assert zygote.name() == "fastq-zygote"
    assert [each.name() for each in zygote.children()] == ["fastq-child"] * 2
    assert main.name() not in ("fastq-zygote", "fastq-child")
    # Nobody's command line was changed.
    assert {tuple(each.cmdline()) for each in (zygote, *zygote.children())} == {tuple(main.cmdline())}
    assert "worker" in main.cmdline()
