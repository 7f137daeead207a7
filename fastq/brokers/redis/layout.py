"""What kombu's messages and bindings are called in Redis, and which queues an exchange feeds. No I/O.

Source: kombu 5.7, transport ``redis``, its options in ``broker_transport_options``.
"""

from __future__ import annotations

import contextlib
import re
from bisect import bisect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeVar

from fastq.brokers.redis.order import Strategy, read_strategy
from fastq.errors import SettingsError

if TYPE_CHECKING:
    from fastq.settings import Settings

V = TypeVar("V")

LAST_PRIORITY: Final = 9


@dataclass(frozen=True)
class Layout:
    """Keys and channels of one database. Priorities here: 0 is the most urgent, 9 the least."""

    prefix: str
    separator: str
    steps: tuple[int, ...]
    unacked: str
    unacked_index: str
    visibility_timeout_s: float
    fanout_prefix: str
    fanout_patterns: bool
    queue_order: Strategy = "round_robin"

    @property
    def leases(self) -> str:
        """A sorted set of our own: who holds messages, and until when it need not be heard of."""
        return f"{self.unacked_index}.leases"

    @property
    def schedule(self) -> str:
        """A sorted set of our own: the lists that messages go back to at their time, and when the first one does."""
        return f"{self.unacked_index}.delayed"

    def list_of(self, queue: str, priority: int) -> str:
        """Return the list for a queue's messages of a priority."""
        if not 0 <= priority <= LAST_PRIORITY:
            priority = 0 if priority < 0 else LAST_PRIORITY
        return f"{self.prefix}{queue}{self._ends[priority]}"

    @cached_property
    def _ends(self) -> list[str]:
        """What follows a queue's name, by priority."""
        steps = [self.steps[bisect(self.steps, priority) - 1] for priority in range(LAST_PRIORITY + 1)]
        return [f"{self.separator}{step}" if step else "" for step in steps]

    def lists_of(self, queue: str) -> list[str]:
        """Return all lists of a queue, the most urgent first."""
        return [self.list_of(queue, step) for step in self.steps]

    def dead_letters_of(self, queue: str) -> str:
        """Return the list for what was rejected for good; our own."""
        return f"{self.prefix}{queue}.dead"

    def delayed_of(self, place: str) -> str:
        """Return the sorted set of what waits for its time and then goes to this list; our own.

        Members are ``<field in unacked> <envelope>``, scores the times at which they are due.
        """
        return f"{place}.delayed"

    def bindings_of(self, exchange: str) -> str:
        """Return the set that says which queues an exchange feeds."""
        return f"{self.prefix}_kombu.binding.{exchange}"

    def lasting_bindings_of(self, exchange: str) -> str:
        """Return the set of those that kombu does not sweep after a while."""
        return f"{self.prefix}_kombu.binding_permanent.{exchange}"

    def binding(self, queue: str, routing_key: str, exchange_type: str) -> str:
        """Return a member of those sets."""
        pattern = topic_pattern(routing_key) if exchange_type == "topic" else ""
        return self.separator.join([routing_key, pattern, queue])

    def queues_for(self, members: Iterable[bytes], routing_key: str) -> list[str]:
        """Return the queues to which a direct or topic exchange with these bindings sends a routing key."""
        found: dict[str, None] = {}
        for member in members:
            key, _, rest = member.decode("utf-8", "replace").partition(self.separator)
            pattern, _, queue = rest.rpartition(self.separator)
            if queue and (_matches(pattern, routing_key) if pattern else key == routing_key):
                found[queue] = None
        return list(found)

    def channel(self, exchange: str, routing_key: str) -> str:
        """Return the pub/sub channel of a fanout exchange; with ``*`` in the key it is a pattern."""
        base = f"{self.prefix}{self.fanout_prefix}{exchange}"
        return f"{base}/{routing_key}" if routing_key and self.fanout_patterns else base


def read_layout(settings: Settings, database: int) -> Layout:
    """Return the layout that the settings ask for. Raises SettingsError for an option that cannot be."""
    options = settings.broker_transport_options
    prefix = _option(options, "global_keyprefix", "", str)
    fanout_prefix = options.get("fanout_prefix", True)
    if not isinstance(fanout_prefix, str):
        fanout_prefix = "/{db}." if fanout_prefix else ""
    return Layout(
        prefix=prefix,
        separator=_option(options, "sep", "\x06\x16", str),
        steps=_steps(options.get("priority_steps") or (0, 3, 6, 9)),
        unacked=prefix + _option(options, "unacked_key", "unacked", str),
        unacked_index=prefix + _option(options, "unacked_index_key", "unacked_index", str),
        visibility_timeout_s=_positive(options, "visibility_timeout", 3600.0),
        fanout_prefix=fanout_prefix.replace("{db}", str(database)),
        fanout_patterns=bool(options.get("fanout_patterns", True)),
        queue_order=read_strategy(options.get("queue_order_strategy") or "round_robin"),
    )


@lru_cache(maxsize=1024)
def topic_pattern(routing_key: str) -> str:
    """Return a binding key of a topic exchange as kombu stores it: ``*`` is a word, ``#`` any number of them."""
    words = {"*": r"[^\.]+", "#": r".*?"}
    parts = (words.get(word) or _escaped(word) for word in routing_key.split("."))
    return "^{}$".format(r"\.".join(parts))


def _escaped(word: str) -> str:
    """Escape as kombu does: all but letters, digits and its own wildcards."""
    signs = {"*": "*", "#": "#", "\0": "\\000"}
    return "".join(each if each.isalnum() else signs.get(each, f"\\{each}") for each in word)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern)
    except re.error:
        return None


def _matches(pattern: str, routing_key: str) -> bool:
    compiled = _compiled(pattern)
    return compiled is not None and compiled.match(routing_key) is not None


def _option(options: Mapping[str, Any], name: str, default: V, kind: Callable[..., V]) -> V:
    value = options.get(name, default)
    if not isinstance(value, type(default)):
        raise SettingsError(f"broker_transport_options[{name!r}] is of type {type(value).__name__}; expected text")
    return kind(value)


def _positive(options: Mapping[str, Any], name: str, default: float) -> float:
    value = options.get(name, default)
    if isinstance(value, timedelta):
        value = value.total_seconds()
    with contextlib.suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise SettingsError(f"broker_transport_options[{name!r}] is {value!r}; expected seconds above 0")
    return float(value)


def _steps(value: Any) -> tuple[int, ...]:
    steps = tuple(value) if isinstance(value, Collection) and not isinstance(value, str) else ()
    if all(isinstance(step, int) for step in steps) and steps[:1] == (0,) and list(steps) == sorted(set(steps)):
        return steps
    raise SettingsError(
        f"broker_transport_options['priority_steps'] is {value!r}; expected rising integers from 0: [0, 3, 6, 9]"
    )
