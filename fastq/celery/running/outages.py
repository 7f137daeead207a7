"""Celery's own sending and storing in a child of a reliable worker: kept at it through outages. Changes settings of
Celery's, nothing of its code.
"""

from __future__ import annotations

import sys
from typing import Any

import celery
from celery.app.defaults import DEFAULTS

PAUSE_S = 0.5
#: With pauses of up to 1 s that is a quarter of an hour; Celery's 5.7 counts them one by one, and knows no "for ever".
PUBLISH_RETRIES = 1000


def wait_out(app: celery.Celery) -> None:
    """Have this process try again until broker and result store are there: a call must not fail by their absence.

    Celery tries for 0.6 s to send, to store for longer, and what a chord needs once. A policy of the user's stands.
    To be called after the fork, before the first command.
    """
    policy = app.conf.task_publish_retry_policy
    if policy == DEFAULTS["task_publish_retry_policy"]:
        policy["max_retries"] = PUBLISH_RETRIES  # in place: who sends has it already
    for backend in {id(task.backend): task.backend for task in app.tasks.values()}.values():
        _keep_at_it(backend)


def _keep_at_it(backend: Any) -> None:
    """Have a store try for ever, if it is Celery's for Redis: who has one has imported it, others need not."""
    module: Any = sys.modules.get("celery.backends.redis")
    if module is None or type(backend) is not module.RedisBackend:
        return
    from redis.backoff import ConstantBackoff
    from redis.retry import Retry

    backend.connparams.setdefault("retry", Retry(ConstantBackoff(PAUSE_S), -1))
    backend.__dict__.pop("client", None)  # made before the fork, without that
