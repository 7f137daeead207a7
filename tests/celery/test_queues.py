"""Queues of every kind that kombu knows, read by a real worker: stock Celery's and fastq's take the same messages."""

from __future__ import annotations

from collections.abc import Callable

import celery
import pytest
from celery.utils.nodenames import worker_direct
from kombu import Connection

from tests.workers import Program, WorkerProcess

SOURCE = """
from celery import Celery
from kombu import Exchange, Queue, binding
from kombu.common import Broadcast

app = Celery("tasks", broker="{url}")
app.conf.worker_direct = True
app.conf.broker_connection_retry_on_startup = True
news = Exchange("news", type="topic")
app.conf.task_queues = [
    Queue("plain", Exchange("plain"), routing_key="plain", consumer_arguments={{"x-priority": 3}}),
    Queue("sport", news, routing_key="sport.#", max_priority=5),
    Queue("both", [binding(Exchange("one"), routing_key="1"), binding(Exchange("two", type="fanout"))]),
    Broadcast("everybody"),
]

@app.task(name="said")
def said(word):
    print(f"said {{word}}.")
"""

SENDINGS = {
    "by name": {"queue": "plain"},
    "by topic": {"exchange": "news", "routing_key": "sport.ball.foot"},
    "by the first binding": {"exchange": "one", "routing_key": "1"},
    "by the second binding": {"exchange": "two", "routing_key": "ignored"},
    "to everybody": {"exchange": "everybody", "routing_key": ""},
}


@pytest.mark.rabbitmq
@pytest.mark.parametrize("program", ["celery", "fastq"])
def test_every_way_into_a_queue_reaches_the_worker(
    program: Program, amqp_url: str, start_worker: Callable[..., WorkerProcess]
) -> None:
    arguments = ("-c", "1", "-n", "w1@here", "--without-gossip", "--without-mingle")
    worker = start_worker(*arguments, source=SOURCE.format(url=amqp_url), program=program)
    client = celery.Celery("client", broker=amqp_url, set_as_current=False)
    with Connection(amqp_url) as connection, connection.Producer() as producer:
        for word, address in SENDINGS.items():
            if "queue" in address:
                client.send_task("said", (word,), queue=address["queue"])
                continue
            # Nothing is declared here: what is there was made by the worker.
            headers, properties, body, _ = client.amqp.as_task_v2(word, "said", (word,), {})
            producer.publish(body, headers=headers, **properties, **address, mandatory=True)
        direct = worker_direct("w1@here")
        client.send_task("said", ("directly",), queue=direct)
    for word in (*SENDINGS, "directly"):
        worker.wait_for_log(rf"said {word}\.", 20.0)
    assert worker.stop() == 0
