"""Catching up at the start: asks the other workers, Celery's included, what was revoked and what their clocks say.

Answering others is remote control's part (the command ``hello``). Elections, the other half of what Celery's workers
say to each other, need nothing from us: whoever does not vote is not counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from fastq.bus import NAMESAKE

if TYPE_CHECKING:
    from fastq.worker.remote.clock import LamportClock

logger = logging.getLogger("fastq.worker")

TIMEOUT_S: Final = 1.0  # Celery's; nobody knows how many will answer


class Asking(Protocol):
    """The part of ``interfaces.Bus`` that is needed here."""

    async def ask(self, method: str, arguments: Mapping[str, Any], timeout_s: float) -> list[tuple[str, Any]]:
        """Return the replies of the nodes that answered in time."""


async def mingle(
    bus: Asking,
    hostname: str,
    instance: str,
    clock: LamportClock,
    revoked: Iterable[str],
    merge: Callable[[Iterable[str]], None],
    timeout_s: float = TIMEOUT_S,
) -> int:
    """Tell the others which ids we know to be revoked, take theirs and their clocks; return how many have answered.

    ``instance`` is this worker's alone: by it another of our name sees that the question is not its own. Raises what
    the bus does.
    """
    logger.info("mingle: searching for neighbors")
    question = {"from_node": hostname, "revoked": list(revoked), "instance": instance}
    answers = await bus.ask("hello", question, timeout_s)
    warn_of_namesakes(hostname, answers)
    replies = [reply for node, reply in answers if node != hostname and isinstance(reply, Mapping) and reply]
    if not replies:
        logger.info("mingle: all alone")
        return 0
    logger.info("mingle: sync with %s nodes", len(replies))
    for reply in replies:
        clock.adjust(reply.get("clock"))
        merge(_ids(reply.get("revoked")))
    logger.info("mingle: sync complete")
    return len(replies)


async def find_namesakes(bus: Asking, hostname: str, instance: str, timeout_s: float = TIMEOUT_S) -> None:
    """Where there is no mingling: ask who is there, and warn when another worker has our name."""
    question = {"from_node": hostname, "instance": instance}
    warn_of_namesakes(hostname, await bus.ask("ping", question, timeout_s))


def warn_of_namesakes(hostname: str, answers: Iterable[tuple[str, Any]]) -> None:
    """Warn when one of those that have answered has our name; one answer is our own."""
    if sum(node == hostname for node, _ in answers) > 1:
        logger.warning(NAMESAKE, hostname)


def _ids(revoked: object) -> list[str]:
    """Return the ids in a reply: a list, of older workers a mapping from ids to when they were revoked."""
    return [each for each in revoked if isinstance(each, str)] if isinstance(revoked, (list, Mapping)) else []
