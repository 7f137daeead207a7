"""celery-exporter: the metrics that it makes of the worker's events and answers are the same."""

from __future__ import annotations

import re
import socket
import urllib.error
import urllib.request

import pytest

from tests.celery.tools.tool import Tool, wait_for
from tests.support.servers import free_ports

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]

METRIC = re.compile(r"^(celery_\w+){(.*)} (\S+)$", re.MULTILINE)
# Counted by time, or by what happens to be there when it is scraped.
VARYING = re.compile(r"_(created|sum|bucket)$")


def counted(event: str, add: float, crash: float, flaky: float, more: str = "") -> dict[str, float]:
    named = {"add": add, "crash": crash, "flaky": flaky}
    name = f"celery_task_{event}{{{more}host,name="
    return {f'{name}"{task}",queue_name="celery"}}': count for task, count in named.items()}


EXPECTED = {
    # The third add had expired: revoked instead of received.
    **counted("sent_total", 3, 1, 2),
    **counted("received_total", 2, 1, 2),
    **counted("started_total", 2, 1, 2),
    **counted("succeeded_total", 2, 0, 1),
    **counted("failed_total", 0, 0, 0, more='exception="",'),
    'celery_task_failed_total{exception="ValueError",host,name="crash",queue_name="celery"}': 1,
    **counted("rejected_total", 0, 0, 0),
    **counted("retried_total", 0, 0, 1),
    **counted("revoked_total", 1, 0, 0),
    'celery_task_runtime_count{host,name="add",queue_name="celery"}': 2,
    'celery_task_runtime_count{host,name="flaky",queue_name="celery"}': 1,
    'celery_queue_length{queue_name="celery"}': 0,
    'celery_active_consumer_count{queue_name="celery"}': 1,
    'celery_active_process_count{queue_name="celery"}': 1,
    'celery_active_worker_count{queue_name="celery"}': 1,
    "celery_worker_tasks_active{host}": 0,
    "celery_worker_up{host}": 1,
}


def scrape(port: int) -> dict[str, float]:
    """Return the metrics by name and labels; {} while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, ConnectionError):
        return {}
    host = socket.gethostname()
    found = METRIC.findall(text.replace(f'hostname="{host}"', "host"))
    return {f"{name}{{{labels}}}": float(value) for name, labels, value in found if not VARYING.search(name)}


def test_the_metrics_are_the_same(tool: Tool) -> None:
    port = free_ports(1)
    options = [f"--broker-url={tool.environment['TOOL_BROKER']}", "--host=127.0.0.1", f"--port={port}"]
    # It has no command of its own when it is installed from the package index.
    log = tool.helper("-c", "from src.cli import cli; cli()", *options)
    wait_for(lambda: scrape(port) or "Started celery-exporter" in log(), 30.0, log)
    worker = tool.worker("exporter", "-E")
    wait_for(lambda: scrape(port).get("celery_worker_up{host}") == 1.0, 20.0, lambda: f"{scrape(port)}\n{log()}")
    assert tool.client("exporter") == ["SUCCESS", "SUCCESS", "FAILURE", "SUCCESS"]
    revoked = 'celery_task_revoked_total{host,name="add",queue_name="celery"}'
    metrics = wait_for(
        lambda: (found := scrape(port)).get(revoked) == 1.0 and found,
        20.0,
        lambda: f"{scrape(port)}\n{log()}\n{worker.log()}",
    )
    assert metrics == EXPECTED
