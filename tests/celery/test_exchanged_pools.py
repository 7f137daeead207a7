"""What a child keeps of connections that were exchanged because the handler of a signal has raised."""

from __future__ import annotations

import celery
from kombu import pools

from fastq.celery.running.connections import Connections


def test_a_pool_that_was_being_made_on_an_exchanged_one_is_made_anew() -> None:
    app = celery.Celery("exchanged", broker="memory://", set_as_current=False)
    connections = Connections(app)
    connection = app.connection_for_write()
    exchanged = pools.connections[connection]
    connections.exchange()
    # As what was interrupted goes on when Python ignores the exception, in the callback of a weak reference.
    made = pools.producers[connection] = pools.ProducerPool(exchanged, limit=app.pool.limit)
    app.amqp._producer_pool = made
    connections.close_old()
    with app.producer_pool.acquire(block=True) as producer:
        assert producer.connection is not None
    pools.reset()
