"""Queues of every kind that kombu knows, read by a real worker: stock Celery's and fastq's take the same messages."""

from __future__ import annotations

import re
from collections.abc import Callable

import celery
import pytest
from celery.utils.nodenames import worker_direct
from kombu import Connection

from tests.support.servers import Redis
from tests.support.stage import empty_database
from tests.support.worker_process import Program, WorkerProcess

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


ORDERED = """
from celery import Celery

app = Celery("tasks", broker="{url}")
app.conf.broker_connection_retry_on_startup = True
app.conf.broker_transport_options = {{"queue_order_strategy": "sorted", "visibility_timout": 60}}

@app.task(name="said")
def said(word):
    print(f"said {{word}}.")
"""


@pytest.mark.redis
@pytest.mark.parametrize("program", ["celery", "fastq"])
def test_queues_are_emptied_in_the_order_of_the_strategy(
    program: Program, redis_server: Redis, start_worker: Callable[..., WorkerProcess]
) -> None:
    redis_url = empty_database(redis_server)
    client = celery.Celery("client", broker=redis_url, set_as_current=False)
    for queue in ("z-low", "a-high"):
        for number in range(30):
            client.send_task("said", (f"{queue}-{number}",), queue=queue)
    arguments = ("-c", "1", "-Q", "z-low,a-high", "--without-gossip", "--without-mingle")
    worker = start_worker(*arguments, source=ORDERED.format(url=redis_url), program=program)
    worker.wait_for_log(r"said ", 20.0, count=60)
    words = re.findall(r"said (\S+)-\d+\.", worker.log())
    assert words == ["a-high"] * 30 + ["z-low"] * 30
    if program == "fastq":
        expected = "broker_transport_options['visibility_timout']: not an option of redis://; did you mean"
        assert worker.log().count(expected) == 1
    assert worker.stop() == 0
