"""The claim on the body of a chord in Redis: what becomes of it when the part that holds it dies.

Celery's script lets one part start the body: it claims that for 6 to some 20 seconds, with a random word. A part that
died meanwhile runs again, finds the claim taken, and nobody starts the body. The same when the answer to the script is
lost, and redis-py or the part's failure repeats it. So here a claim names its part, which takes it over by calling the
script again; the part's next run, or whoever records its failure, lifts it. One that names no part is another worker's,
and waited for.
"""

from __future__ import annotations

import contextlib
import sys
import time
from types import SimpleNamespace
from typing import Any

from celery import _state
from kombu.utils.encoding import bytes_to_str

from fastq.states import SUCCESS

_LIFT = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"

#: Celery's script takes the claim by these words; with ours behind them, from an earlier call of the same part as well.
_TAKE = "redis.call('SET', ckey, claim_token, 'NX', 'EX', claim_expires)"
_TAKE_OVER = """
        or string.sub(redis.call('GET', ckey), 1, #tid + 1) == tid .. '/'
            and redis.call('SET', ckey, claim_token, 'EX', claim_expires)"""

_DONE = "done"  # the script's word for a chord whose body was started
_LOOK_EVERY_S = 0.1


def name_claims() -> None:
    """Have claims name the part that makes them, and be its own. Call it once the application has its result store."""
    module: Any = sys.modules.get("celery.backends.redis")
    if module is None or not hasattr(module, "CHORD_CLAIM_EXTEND_LUA") or hasattr(module.uuid4, "original"):
        return
    original = module.uuid4

    def uuid4() -> Any:
        made, task = original(), _state.get_current_task()
        return made if task is None else SimpleNamespace(hex=f"{task.request.id}/{made.hex}")

    uuid4.original = original  # type: ignore[attr-defined]
    module.uuid4 = uuid4
    module.CHORD_PART_RETURN_LUA = module.CHORD_PART_RETURN_LUA.replace(_TAKE, _TAKE + _TAKE_OVER)


def free_claim(backend: Any, part: str | None, group: str | None) -> None:
    """Return when no run of this part of a chord that has ended holds the claim on the body, or the store is away."""
    if group and part and _has_claims(backend):
        with contextlib.suppress(*backend.connection_errors):
            _free(backend.client, backend.get_key_for_group(group, ".c"), part)


def end_part(request: Any) -> None:
    """Count a part, Celery's Request, that had stored its success when it died: it may not have been counted yet."""
    if request.group and _has_claims(request.task.backend) and (meta := request._success_was_stored()):
        request.task.backend.on_chord_part_return(request._context, SUCCESS, meta["result"])


def _has_claims(backend: Any) -> bool:
    return hasattr(type(backend), "_chord_claim_extend_script")


def _free(client: Any, key: Any, part: str) -> None:
    while (claim := client.get(key)) is not None and bytes_to_str(claim) != _DONE:
        holder, _, word = bytes_to_str(claim).partition("/")
        if holder == part:
            client.eval(_LIFT, 1, key, claim)
        elif word or client.pttl(key) < 0:
            return  # another part's, which will see to it itself
        else:
            time.sleep(_LOOK_EVERY_S)
