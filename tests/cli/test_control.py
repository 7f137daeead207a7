"""`fastq status`, `inspect`, `control` against stock Celery workers, Celery's against ours, on RabbitMQ and Redis."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fastq.net.urls import mask_url
from tests.support.control_node import CeleryWorker, Node, command_line, row
from tests.support.servers import RabbitMQ, Redis

BOTH = [pytest.param("amqp", marks=pytest.mark.rabbitmq), pytest.param("redis", marks=pytest.mark.redis)]
_databases = itertools.count(1)


def new_url(request: pytest.FixtureRequest, kind: str) -> str:
    """Return the URL of a broker that nobody else uses."""
    if kind == "amqp":
        rabbitmq: RabbitMQ = request.getfixturevalue("rabbitmq")
        return rabbitmq.url(rabbitmq.new_vhost())
    server: Redis = request.getfixturevalue("redis_server")
    return server.url(next(_databases))


@pytest.fixture(scope="module")
def stocks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], tuple[str, str]]]:
    """A function that returns the stock Celery worker on a kind of broker, one for all who ask."""
    workers: list[CeleryWorker] = []

    @cache
    def start(kind: str) -> tuple[str, str]:
        url = new_url(request, kind)
        workers.append(CeleryWorker(tmp_path_factory.mktemp("stock"), url, "stock@here", "-c", "1"))
        return url, "stock@here"

    yield start
    for worker in workers:
        worker.stop()


@pytest.fixture(params=BOTH)
def stock(request: pytest.FixtureRequest, stocks: Callable[[str], tuple[str, str]]) -> tuple[str, str]:
    """A stock Celery worker: the broker's URL and the node's name."""
    return stocks(request.param)


@pytest.fixture(params=BOTH)
def node(request: pytest.FixtureRequest) -> Iterator[tuple[str, Node]]:
    url = new_url(request, request.param)
    node = Node(url, "fastq@here").start()
    yield url, node
    node.stop()


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return new_url(request, request.param)


def fastq(url: str, *arguments: str) -> Any:
    return command_line("fastq", "-C", "-b", url, *arguments)


def celery(url: str, *arguments: str) -> Any:
    return command_line("celery", "-C", "-b", url, *arguments)


# -- our command line, their worker


def test_status_lists_a_stock_worker(stock: tuple[str, str]) -> None:
    url, name = stock
    done = fastq(url, "status")
    assert (done.returncode, done.stdout) == (0, f"->  {name}: OK\n\n1 node online.\n"), done.stderr
    assert json.loads(fastq(url, "status", "-j").stdout) == {name: {"ok": "pong"}}


QUEUES = (
    "from fastq import FastQ\napp = FastQ('q')\n@app.task\ndef read(): ...\n@app.task(queue='b')\ndef left(): ...\n"
)


def test_status_names_the_queue_that_no_worker_reads(stock: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "queues.py").write_text(QUEUES)
    done = command_line("fastq", "-C", "-A", "queues", "-b", stock[0], "status", folder=tmp_path)
    assert (done.returncode, done.stdout.count("OK")) == (0, 1), done.stderr
    assert done.stderr == (
        "Queue 'b' is read by none of them: calls of queues.left go there and wait. "
        "Add it to task_queues, or start a worker with -Q b\n"
    )


CALLED = {
    "fastq": "from fastq import FastQ\napp = FastQ('calls', backend={backend!r})\n",
    "celery": "from celery import Celery\napp = Celery('calls', backend={backend!r})\n",
}
both_kinds = pytest.mark.parametrize("kind", CALLED)


def call_in_vain(url: str, folder: Path, kind: str, *options: str) -> str:
    """Return what is said on standard error of a call that nobody runs."""
    source = CALLED[kind].format(backend="rpc://" if url.startswith("amqp") else url)
    (folder / "calls.py").write_text(f"{source}@app.task\ndef left(): ...\n")
    words = ("-A", "calls", "-b", url, "call", "calls.left", "--wait", "0.2", *options)
    done = command_line("fastq", "-C", *words, folder=folder)
    assert done.returncode == 75, done.stderr
    return str(done.stderr)


@both_kinds
def test_who_waits_for_a_call_to_a_queue_that_nobody_reads_is_told(
    stock: tuple[str, str], tmp_path: Path, kind: str
) -> None:
    unread = call_in_vain(stock[0], tmp_path, kind, "--queue", "b")
    assert "; it went to queue 'b', which none of those that are up reads (stock@here). Start one with -Q b" in unread
    assert "went to" not in call_in_vain(stock[0], tmp_path, kind, "--countdown", "60")
    assert "went to" not in call_in_vain(stock[0], tmp_path, kind, "--exchange", "celery", "--routing-key", "b")


@pytest.mark.parametrize("url", BOTH, indirect=True)
@both_kinds
def test_who_waits_without_a_worker_is_told(url: str, tmp_path: Path, kind: str) -> None:
    assert f"; no worker is up on {mask_url(url)}, or none that answers. Start one there: fastq -A" in call_in_vain(
        url, tmp_path, kind
    )


#: What is printed does not depend on the broker: compared on RabbitMQ, the last ones on Redis too.
SAME = [
    ("inspect", "ping"), ("inspect", "active"), ("inspect", "revoked"), ("inspect", "registered"),
    ("inspect", "registered", "max_retries", "name"), ("inspect", "active_queues"), ("inspect", "conf"),
    ("inspect", "conf", "true"), ("inspect", "report"), ("inspect", "query_task", "a", "b"), ("inspect", "objgraph"),
    ("control", "rate_limit", "proj.add", "10/m"), ("control", "rate_limit", "nope", "10/m"),
    ("control", "time_limit", "proj.add", "10", "20"), ("control", "pool_restart"), ("control", "autoscale", "3"),
    ("control", "heartbeat"), ("control", "revoke", "abc"), ("control", "terminate", "TERM", "abc"),
    ("control", "revoke_by_stamped_headers", "a=b"), ("control", "add_consumer", "foo", "ex", "topic", "a.#"),
    ("control", "cancel_consumer", "foo"), ("control", "pool_grow", "1"),
]  # fmt: skip


ON_RABBITMQ = [
    pytest.param("amqp", each, id=" ".join(each), marks=[pytest.mark.rabbitmq, pytest.mark.slow]) for each in SAME
]
ON_REDIS = [pytest.param("redis", each, id=" ".join(each), marks=pytest.mark.redis) for each in SAME[-4:]]


@pytest.mark.parametrize(("stock", "arguments"), [*ON_RABBITMQ, *ON_REDIS], indirect=["stock"])
def test_output_is_what_celery_prints(stock: tuple[str, str], arguments: tuple[str, ...]) -> None:
    url, name = stock
    place = ("-d", name, "-t", "10")
    ours, theirs = fastq(url, *arguments, *place), celery(url, *arguments, *place)
    assert ours.stdout == theirs.stdout
    assert name in ours.stdout
    assert ours.returncode == theirs.returncode == 0


def test_json_is_what_celery_prints(stock: tuple[str, str]) -> None:
    url, name = stock
    for arguments in (("inspect", "active_queues"), ("inspect", "registered"), ("control", "heartbeat")):
        place = ("-d", name, "-t", "10", "-j")
        ours, theirs = fastq(url, *arguments, *place), celery(url, *arguments, *place)
        assert json.loads(ours.stdout) == json.loads(theirs.stdout)


@pytest.mark.parametrize("command", ["clock", "stats", "memsample"])
def test_what_changes_has_the_same_lines(stock: tuple[str, str], command: str) -> None:
    url, name = stock
    place = ("inspect", command, "-d", name, "-t", "10")
    texts = [re.sub(r"[\d.]+", "0", program(url, *place).stdout) for program in (fastq, celery)]
    keys = [re.findall(r'"[a-z-]+":|[KMG]B|online', text) for text in texts]
    assert keys[0] == keys[1]
    assert name in texts[0]


def test_nobody_replies(stock: tuple[str, str]) -> None:
    url, _ = stock
    for arguments in (("status",), ("inspect", "ping"), ("control", "heartbeat")):
        ours, theirs = (program(url, *arguments, "-d", "no@body", "-t", "0.3") for program in (fastq, celery))
        assert ours.returncode == theirs.returncode == 69
        assert ours.stderr.startswith("Error: No nodes replied within time constraint, asked: no@body; ")
        assert ours.stdout == theirs.stdout == ""


# -- their command line, our worker


def test_celery_s_status_sees_our_node(node: tuple[str, Node]) -> None:
    url, _ = node
    done = celery(url, "status")
    assert (done.returncode, done.stdout) == (0, "->  fastq@here: OK\n\n1 node online.\n"), done.stderr


def test_celery_s_inspect_understands_every_reply(node: tuple[str, Node]) -> None:
    url, ours = node
    assert ours.view is not None
    ours.view.core.rows["active"] = [row("proj.nap", "a1", [60], pid=11, started=1e9, acknowledged=True)]
    ours.view.core.rows["scheduled"] = [row("proj.add", "s1", [1, 2], eta=2e9)]
    commands = ["ping", "active", "scheduled", "reserved", "revoked", "registered", "stats", "conf", "report", "clock"]
    for command in [*commands, "active_queues", "memsample", "memdump"]:
        done = celery(url, "inspect", command, "-t", "10", "-d", "fastq@here")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("->  fastq@here: OK\n"), done.stdout
    found = json.loads(celery(url, "inspect", "query_task", "s1", "-j", "-d", "fastq@here", "-t", "10").stdout)
    assert found["fastq@here"]["s1"][0] == "scheduled"
    failing = celery(url, "inspect", "objgraph", "-d", "fastq@here", "-t", "10")
    assert "ERROR" in failing.stdout


def test_celery_s_control_works_on_our_node(node: tuple[str, Node]) -> None:
    url, ours = node
    assert ours.view is not None
    said = {
        ("pool_grow", "2"): "pool will grow",
        ("pool_shrink", "1"): "pool will shrink",
        ("rate_limit", "proj.add", "10/m"): "new rate limit set successfully",
        ("time_limit", "proj.add", "1", "2"): "time limits set successfully",
        ("revoke", "x"): "tasks {'x'} flagged as revoked",
        ("terminate", "KILL", "x"): "terminate: tasks unknown",
        ("add_consumer", "foo"): "add consumer foo",
        ("cancel_consumer", "foo"): "no longer consuming from foo",
        ("enable_events",): "task events enabled",
        ("election", "1", "topic"): "",
    }
    for words, text in said.items():
        done = celery(url, "control", *words, "-t", "10", "-d", "fastq@here")
        if words[0] == "election":
            continue
        assert text in done.stdout, (words, done.stdout, done.stderr)
    assert ours.view.done[:2] == [("grow", 2), ("shrink", 1)]
    assert ours.view.core.tasks[b"proj.add"].time_limit == 2


def test_a_celery_worker_mingles_with_our_node(
    node: tuple[str, Node], tmp_path_factory: pytest.TempPathFactory
) -> None:
    url, ours = node
    assert ours.view is not None
    ours.view.revocations.update(["known-here"])
    worker = CeleryWorker(tmp_path_factory.mktemp("mingle"), url, "stock@here", "-c", "1")
    try:
        assert "mingle: sync with 1 nodes" in worker.log()
        reply = json.loads(fastq(url, "inspect", "revoked", "-j", "-d", "stock@here", "-t", "10").stdout)
        assert reply == {"stock@here": ["known-here"]}
        both = json.loads(fastq(url, "status", "-j").stdout)
        assert both.keys() == {"stock@here", "fastq@here"}
    finally:
        worker.stop()


# -- without any worker


def test_commands_are_listed() -> None:
    for kind in ("inspect", "control"):
        ours, theirs = command_line("fastq", kind, "--list"), command_line("celery", kind, "--list")
        names = [re.findall(r"^  ([a-z_]+)", text, re.M) for text in (ours.stdout, theirs.stdout)]
        assert names[0] == names[1]
        assert len(names[0]) > 10
        assert ours.returncode == 0


def test_a_wrong_command_line_is_explained() -> None:
    url = "amqp://127.0.0.1:1//"
    for arguments, text in {
        ("inspect", "nosuch"): "Available inspect commands: active, active_queues",
        ("control", "active"): "Command active not recognized",
        ("control", "pool_grow", "many"): "n is 'many', not a whole number",
        ("control", "time_limit", "proj.add", "long"): "soft is 'long', not a number",
        ("inspect", "conf", "all"): "with_defaults is 'all', not true or false",
        ("control", "revoke"): "Missing argument; usage: revoke [id1 [id2",
        ("control", "terminate", "KILL"): "Missing argument; usage: terminate <signal> [id1 [id2",
        ("control", "rate_limit", "proj.add"): "Missing argument; usage: rate_limit <task_name> <rate_limit",
        ("control", "pool_grow", "1", "2"): "takes arguments: [N=1]",
        ("inspect",): "Missing argument 'COMMAND'",
    }.items():
        done = fastq(url, *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert text in done.stderr


def test_an_embedded_broker_has_no_remote_control() -> None:
    for words in (("inspect", "ping"), ("control", "heartbeat"), ("events", "-d")):
        done = fastq("sqlite:///nowhere.db", *words)
        assert (done.returncode, "carries no remote control" in done.stderr) == (78, True)


def test_a_broker_that_is_away_is_named() -> None:
    done = fastq("amqp://127.0.0.1:1//", "inspect", "ping")
    assert done.returncode == 75, done.stderr
    assert "127.0.0.1:1" in done.stderr
