"""In which order queues are looked at: by name as kombu calls it, or by an object of the application's own.

Source: kombu 5.7, ``queue_order_strategy`` of its transport ``redis``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias, cast

from fastq.errors import SettingsError
from fastq.plugins import load

logger = logging.getLogger("fastq.worker")

#: Each first in its turn, always in the order given, always by name.
QUEUE_ORDERS: Final = ("round_robin", "priority", "sorted")
#: Where kombu has its own three.
_KOMBUS: Final = "kombu.utils.scheduling"

#: One of ``QUEUE_ORDERS``, or what makes an object with ``update(queues)``, ``consume(n)`` and ``rotate(last_used)``.
Strategy: TypeAlias = "str | Callable[[], Any]"


def read_strategy(value: Any) -> Strategy:
    """Return the strategy that the option names: a name, a place as ``module:name`` or with dots, or the class itself.

    Raises SettingsError for what is none.
    """
    if isinstance(value, str):
        name = value.removeprefix(_KOMBUS)[1:].removesuffix("_cycle") if value.startswith(_KOMBUS) else value
        if name in QUEUE_ORDERS:
            return name
        module, dot, attribute = value.rpartition(":" if ":" in value else ".")
        if dot:
            value = load(f"{module}:{attribute}")
    if callable(value) and all(callable(getattr(value, each, None)) for each in ("update", "consume", "rotate")):
        return cast("Strategy", value)
    raise SettingsError(
        f"broker_transport_options['queue_order_strategy'] is {value!r}; expected one of {', '.join(QUEUE_ORDERS)}, or "
        "where there is a class with update(), consume() and rotate()"
    )


class QueueOrder:
    """Says which of the queues the next messages may come from, the first ones first."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._given: list[str] = []
        self._turn = -1
        self._own: Any = None if isinstance(strategy, str) else strategy
        self._own = self._ask(lambda make: make())

    @property
    def has_own(self) -> bool:
        """Return whether an object of the application's is asked at each look, by ``choose``."""
        return self._own is not None

    def update(self, queues: Sequence[str]) -> None:
        """Receive from these queues from now on."""
        self._given = sorted(queues) if self._strategy == "sorted" else list(queues)
        self._ask(lambda own: own.update(list(queues)))

    @property
    def queues(self) -> list[str]:
        """Return all queues."""
        return self._given

    def turn(self) -> int:
        """Return which queue is looked at first, -1 for all in their order; the next time it is another's turn."""
        if self._strategy == "round_robin" and self._given:
            self._turn = (self._turn + 1) % len(self._given)
        return self._turn

    def choose(self) -> list[str]:
        """Return the queues that may give something now, the first ones first, as the application's object says."""
        chosen = self._ask(lambda own: dict.fromkeys(own.consume(len(self._given))))
        return self._given if chosen is None else [queue for queue in chosen if queue in self._given]

    def gave(self, queues: Iterable[str]) -> None:
        """Tell the application's object which queues have given something."""
        self._ask(lambda own: [own.rotate(queue) for queue in queues])

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """Return what the application's object answers; None without one, as from when it fails: that stops nothing."""
        try:
            return None if self._own is None else question(self._own)
        except Exception as error:
            text = "queue_order_strategy %r has failed: queues are looked at in their order"
            logger.error(text, self._strategy, exc_info=error)
            self._own = None
            return None
