"""Brokers: how messages get from producers to workers. Finds the one that a URL names; imports no other."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from fastq.errors import SettingsError

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.interfaces import Consumer, Publisher, Saver
    from fastq.settings import Settings

_AMQP: Final = ("fastq.transport.amqp_blocking:AmqpPublisher", "fastq.transport.amqp:AmqpConsumer")
_REDIS: Final = ("fastq.transport.redis_blocking:RedisPublisher", "fastq.transport.redis:RedisConsumer")

#: What makes a publisher and a consumer, by the scheme of the URL.
BROKERS: Final = {
    "sqlite": ("fastq.transport.sqlite:SqlitePublisher", "fastq.transport.sqlite:SqliteConsumer"),
    "memory": ("fastq.transport.memory:MemoryPublisher", "fastq.transport.memory:MemoryConsumer"),
    "amqp": _AMQP,
    "amqps": _AMQP,
    "pyamqp": _AMQP,
    "librabbitmq": _AMQP,
    **dict.fromkeys(("redis", "rediss", "sentinel", "redis+socket", "redis+unix", "unix", "socket"), _REDIS),
}

_REDIS_SAVER: Final = "fastq.transport.redis_store:RedisSaver"

#: What goes on before the broker has confirmed, by the publisher that waits for it.
BEHIND: Final = {
    "AmqpPublisher": "fastq.transport.amqp_behind:BehindPublisher",
    "RedisPublisher": "fastq.transport.redis_behind:RedisBehindPublisher",
}

#: What stores a worker's results, by the scheme of the URL; replies by rpc:// need none.
SAVERS: Final = {
    "sqlite": BROKERS["sqlite"][1],
    "memory": BROKERS["memory"][1],
    **dict.fromkeys(("redis", "rediss", "sentinel", "redis+socket", "redis+unix", "unix", "socket"), _REDIS_SAVER),
}


def is_amqp(url: str) -> bool:
    """Return whether a broker's URL is one of RabbitMQ's."""
    return BROKERS.get(_scheme(url)) == _AMQP


def open_publisher(url: str, settings: Settings) -> Publisher:
    """Return a publisher to the broker that a URL names; it connects at its first use. Raises SettingsError."""
    make = _find(url, 0)
    if settings.broker_transport_options.get("confirm_publish") == "behind":
        make = _load(BEHIND[make.__name__]) if make.__name__ in BEHIND else make
    publisher: Publisher = make(url, settings)
    return publisher


def open_consumer(url: str, settings: Settings, core: Core | None) -> Consumer:
    """Return a worker's consumer for the broker that a URL names; ``open`` connects it. Raises SettingsError."""
    consumer: Consumer = _find(url, 1)(url, settings, core)
    return consumer


def open_saver(url: str, settings: Settings, core: Core | None) -> Saver:
    """Return what stores a worker's results where a URL says; ``open`` connects it. Raises SettingsError."""
    scheme = _scheme(url)
    found = SAVERS.get(scheme)
    if found is None:
        known = ", ".join(["rpc://", *(f"{name}://" for name in SAVERS), "disabled"])
        raise SettingsError(f"results cannot be stored at {scheme}://; set result_backend to one of {known}")
    saver: Saver = _load(found)(url, settings, core)
    return saver


def _find(url: str, side: int) -> Any:
    found = BROKERS.get(_scheme(url))
    if found is None:
        known = ", ".join(f"{name}://" for name in BROKERS)
        raise SettingsError(f"no broker is known for {_scheme(url)}://; set broker_url to one of {known}")
    return _load(found[side])


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower()


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
