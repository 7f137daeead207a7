"""Brokers: how messages get from producers to workers. Finds the one that a URL names; imports no other."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from fastq.errors import SettingsError

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.interfaces import Consumer, Publisher
    from fastq.settings import Settings

_AMQP: Final = ("fastq.transport.amqp_blocking:AmqpPublisher", "fastq.transport.amqp:AmqpConsumer")

#: What makes a publisher and a consumer, by the scheme of the URL.
BROKERS: Final = {
    "sqlite": ("fastq.transport.sqlite:SqlitePublisher", "fastq.transport.sqlite:SqliteConsumer"),
    "memory": ("fastq.transport.memory:MemoryPublisher", "fastq.transport.memory:MemoryConsumer"),
    "amqp": _AMQP,
    "amqps": _AMQP,
    "pyamqp": _AMQP,
    "librabbitmq": _AMQP,
}


def open_publisher(url: str, settings: Settings) -> Publisher:
    """Return a publisher to the broker that a URL names; it connects at its first use. Raises SettingsError."""
    make = _find(url, 0)
    if settings.broker_transport_options.get("confirm_publish") == "behind" and make.__name__ == "AmqpPublisher":
        from fastq.transport.amqp_behind import BehindPublisher as make  # noqa: N813
    publisher: Publisher = make(url, settings)
    return publisher


def open_consumer(url: str, settings: Settings, core: Core | None) -> Consumer:
    """Return a worker's consumer for the broker that a URL names; ``open`` connects it. Raises SettingsError."""
    consumer: Consumer = _find(url, 1)(url, settings, core)
    return consumer


def _find(url: str, side: int) -> Any:
    scheme = url.partition(":")[0].lower()
    found = BROKERS.get(scheme)
    if found is None:
        known = ", ".join(f"{name}://" for name in BROKERS)
        raise SettingsError(f"no broker is known for {scheme}://; set broker_url to one of {known}")
    module, _, name = found[side].partition(":")
    return getattr(import_module(module), name)
