"""``fastq.accelerate(app)``: a Celery application that publishes through fastq, with everything else as it was.

For programs that only send: web processes, scripts. Nothing is connected and no setting read before the first message.
"""

from __future__ import annotations

from typing import Any

import celery

from fastq.celery.sending.sender import Sender
from fastq.errors import SettingsError

OLDEST = (5, 4)


def accelerate(app: celery.Celery, *, subscribe_early: bool = False, confirm_behind: bool = False) -> celery.Celery:
    """Have a Celery application's messages sent by fastq's compiled path, and return the application.

    The messages are Celery's, byte for byte; so are routing, signals, retries, errors and results. What fastq does not
    send itself goes through Celery's own code: other brokers than RabbitMQ and Redis, protocol 1, stamps, ``producer=``
    and ``connection=``, ``task_send_sent_event``, delayed tasks with quorum queues, processes patched by gevent or
    eventlet, and everything while ``send_task`` or kombu's ``Producer.publish`` is replaced or overridden. Doing it
    twice changes nothing.

    Results in Redis: Celery subscribes to a call's states before it sends the call. Here that is done when somebody
    waits for the result, which misses none but states that were over by then; ``subscribe_early`` does it as Celery,
    for about 60 µs a call.

    Redis as broker: Celery waits for the answer to each message. With ``confirm_behind`` a call goes on without it:
    up to 512 messages are under way, are sent again after a lost connection (one may then arrive twice), and are
    waited for when the program ends. A crash of the program may lose them, and what Redis refuses is only logged.

    Raises SettingsError for what is no application of Celery 5.4 or newer.
    """
    if celery.VERSION[:2] < OLDEST:
        raise SettingsError(
            f"fastq.accelerate needs Celery {OLDEST[0]}.{OLDEST[1]} or newer, this is {celery.__version__}: "
            "pip install --upgrade celery"
        )
    evaluate: Any = getattr(app, "_get_current_object", None)
    target = evaluate() if evaluate is not None else app
    if not isinstance(target, celery.Celery):
        raise SettingsError(f"fastq.accelerate takes a celery.Celery application, this is {target!r:.80}")
    # An application that has a send_task of its own keeps it; ours, from an earlier call, is enough.
    if "send_task" not in target.__dict__:
        _install(target, Sender(target, subscribe_early, confirm_behind))
    return target


def _install(app: celery.Celery, sender: Sender) -> None:
    close = app.close

    def close_both() -> None:
        sender.close()
        close()

    app.send_task = sender.send_task
    app.close = close_both
