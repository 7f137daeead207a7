"""Brokers: how messages get from producers to workers. One table says what stands behind a URL; imports no broker.

A broker of somebody else's is a ``Broker`` too: named by ``module:NAME`` in place of a scheme, as in
``mybroker:BROKER://place``, or by an entry point of the group ``fastq.brokers``, whose name is the scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fastq.errors import SettingsError
from fastq.net.urls import mask_url, scheme_of, split_urls
from fastq.plugins import Target, find_plugin, load, plugin_names, unknown_part

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.interfaces import AsyncPublisher, BlockingBus, Bus, Clock, Consumer, Publisher
    from fastq.settings import Settings

#: The group of entry points in which other packages name their brokers.
ENTRY_POINTS: Final = "fastq.brokers"


@dataclass(frozen=True, slots=True)
class Broker:
    """What stands behind the schemes of one kind of broker. Targets are objects, or where they are (``module:name``).

    ``publisher`` and its kin are called with (url, settings), ``consumer`` with (url, settings, core): see
    ``interfaces``.
    """

    schemes: tuple[str, ...]
    publisher: Target
    consumer: Target
    #: Publishes before the broker has confirmed (``confirm_publish="behind"``); None: ``publisher`` does it all.
    behind: Target | None = None
    #: Publishes from an event loop; None: ``publisher`` does, in a thread.
    on_loop: Target | None = None
    #: Called with (url, settings, clock) and (url, settings); None: no remote control and no events.
    bus: Target | None = None
    blocking_bus: Target | None = None
    #: Names that ``broker_transport_options`` may have; None: any.
    options: frozenset[str] | None = None
    #: Schemes whose connections are encrypted.
    tls_schemes: tuple[str, ...] = ()
    #: What a URL without a port means, by its scheme; nothing where there are no ports.
    ports: Mapping[str, int] = field(default_factory=dict)
    user: str | None = None
    virtual_host: str = ""
    #: Whether messages come by AMQP, with its delivery tags and exchanges; replies (``rpc://``) need it.
    speaks_amqp: bool = False
    #: Whether it can do without fetching in advance (``worker_disable_prefetch``).
    may_not_prefetch: bool = False


#: What kombu's own connection reads, whatever the transport; ``confirm_publish`` is ours for Redis too.
_COMMON = "confirm_publish connect_retries_timeout errback interval_max interval_start interval_step max_retries"
# Source of both: kombu 5.7, transports ``pyamqp`` and ``redis``; py-amqp 5.3, ``Connection``. What means nothing here
# (pools of connections, polling) is known all the same, as it does no harm.
_AMQP_OPTIONS = (
    "authentication bind_host channel_max client_properties confirm_timeout connect_timeout connection_errors "
    "fail_fast frame_handler frame_max frame_writer heartbeat host insist locale login_method login_response "
    "on_blocked on_open on_tune_ok on_unblocked password raise_on_initial_eintr read_timeout socket_settings ssl "
    "userid virtual_host write_timeout"
)
_REDIS_OPTIONS = (
    "ack_emulation body_encoding brpop_timeout client_name connection_pool_class credential_provider "
    "deadletter_queue fanout_patterns fanout_prefix global_keyprefix health_check_interval master_name "
    "max_connections min_other_sentinels polling_interval priority_steps queue_order_strategy "
    "reauth_check_interval retry retry_on_error retry_on_timeout sentinel_fanout_compat sentinel_kwargs sep "
    "socket_connect_timeout socket_keepalive socket_keepalive_options socket_timeout unacked_index_key unacked_key "
    "unacked_mutex_expire unacked_mutex_key unacked_restore_interval unacked_restore_limit unacked_restore_throttle "
    "visibility_timeout"
)

RABBITMQ: Final = Broker(
    schemes=("amqp", "amqps", "pyamqp", "librabbitmq"),
    publisher="fastq.brokers.rabbitmq.publisher:AmqpPublisher",
    consumer="fastq.brokers.rabbitmq.consumer:AmqpConsumer",
    behind="fastq.brokers.rabbitmq.behind:BehindPublisher",
    on_loop="fastq.brokers.rabbitmq.on_loop:AmqpLoopPublisher",
    bus="fastq.brokers.rabbitmq.bus:open_bus",
    blocking_bus="fastq.brokers.rabbitmq.bus:open_blocking_bus",
    options=frozenset(f"{_COMMON} {_AMQP_OPTIONS}".split()),
    tls_schemes=("amqps",),
    ports={"amqp": 5672, "pyamqp": 5672, "librabbitmq": 5672, "amqps": 5671},
    user="guest",
    virtual_host="/",
    speaks_amqp=True,
)
REDIS: Final = Broker(
    schemes=("redis", "rediss", "sentinel", "redis+socket", "redis+unix", "unix", "socket"),
    publisher="fastq.brokers.redis.publisher:RedisPublisher",
    consumer="fastq.brokers.redis.consumer:RedisConsumer",
    behind="fastq.brokers.redis.behind:RedisBehindPublisher",
    on_loop="fastq.brokers.redis.on_loop:RedisLoopPublisher",
    bus="fastq.brokers.redis.bus:open_bus",
    blocking_bus="fastq.brokers.redis.bus:open_blocking_bus",
    options=frozenset(f"{_COMMON} {_REDIS_OPTIONS}".split()),
    tls_schemes=("rediss",),
    ports={"redis": 6379, "rediss": 6379, "sentinel": 26379},
    virtual_host="0",
    may_not_prefetch=True,
)
SQLITE: Final = Broker(
    schemes=("sqlite",),
    publisher="fastq.brokers.sqlite.broker:SqlitePublisher",
    consumer="fastq.brokers.sqlite.broker:SqliteConsumer",
    options=frozenset(_COMMON.split()),
)
MEMORY: Final = Broker(
    schemes=("memory",),
    publisher="fastq.brokers.memory.broker:MemoryPublisher",
    consumer="fastq.brokers.memory.broker:MemoryConsumer",
    options=frozenset(_COMMON.split()),
)

#: Every kind of broker that is built in.
BROKERS: Final = (RABBITMQ, REDIS, SQLITE, MEMORY)
_OF_SCHEME: Final = {scheme: broker for broker in BROKERS for scheme in broker.schemes}


def find_broker(url: str | Sequence[str]) -> Broker:
    """Return what stands behind a URL, or the first of several. Raises SettingsError for a scheme that is not known."""
    scheme = scheme_of(url)
    found = _OF_SCHEME.get(scheme) or find_plugin(ENTRY_POINTS, scheme, Broker)
    if found is None:
        masked = mask_url(next(iter(split_urls(url)), ""))
        known = [*_OF_SCHEME, *plugin_names(ENTRY_POINTS)]
        raise unknown_part(scheme, masked, "no broker is known for", "broker_url", known)
    return found


def try_broker(url: str | Sequence[str] | None) -> Broker | None:
    """Return what stands behind a URL, or None where nothing does."""
    try:
        return find_broker(url or "")
    except SettingsError:
        return None


def open_publisher(url: str, settings: Settings) -> Publisher:
    """Return a publisher to the broker that a URL names; it connects at its first use. Raises SettingsError."""
    broker = find_broker(url)
    is_behind = settings.broker_transport_options.get("confirm_publish") == "behind"
    publisher: Publisher = load((is_behind and broker.behind) or broker.publisher)(url, settings)
    return publisher


def open_async_publisher(url: str, settings: Settings) -> AsyncPublisher:
    """Return a publisher for the running event loop; it connects at its first use. Raises SettingsError."""
    target = find_broker(url).on_loop
    if target is None:
        return async_form(open_publisher(url, settings))
    publisher: AsyncPublisher = load(target)(url, settings)
    return publisher


def async_form(publisher: Publisher) -> AsyncPublisher:
    """Return a publisher as a loop may use it: its own ``on_loop``, else what it does is done in a thread."""
    own: Callable[[], AsyncPublisher] | None = getattr(publisher, "on_loop", None)
    if own is not None:
        return own()
    from fastq.brokers.threaded import ThreadedPublisher

    return ThreadedPublisher(publisher)


def open_consumer(url: str, settings: Settings, core: Core | None) -> Consumer:
    """Return a worker's consumer for the broker that a URL names; ``open`` connects it. Raises SettingsError."""
    consumer: Consumer = load(find_broker(url).consumer)(url, settings, core)
    return consumer


def open_bus(url: str, settings: Settings, clock: Clock) -> Bus:
    """Return the worker's side of the bus at a broker; ``open`` connects it. Raises SettingsError."""
    bus: Bus = load(find_broker(url).bus or _no_bus(url))(url, settings, clock)
    return bus


def open_blocking_bus(url: str, settings: Settings) -> BlockingBus:
    """Return the client's side of the bus at a broker. Raises SettingsError."""
    bus: BlockingBus = load(find_broker(url).blocking_bus or _no_bus(url))(url, settings)
    return bus


def has_bus(url: str) -> bool:
    """Return whether the broker of a URL carries remote control and events."""
    broker = try_broker(url)
    return broker is not None and broker.bus is not None


def _no_bus(url: str) -> str:
    raise SettingsError(f"{scheme_of(url)}:// carries no remote control and no events; use amqp:// or redis://")


def unknown_options(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield (name, what to say of it) of each transport option that the broker in the settings does not have."""
    broker = try_broker(settings.broker_url)
    if broker is None or broker.options is None:
        return
    scheme = scheme_of(settings.broker_url)
    for name in settings.broker_transport_options:
        if name not in broker.options:
            hint = _hint(str(name), broker.options)
            yield f"broker_transport_options[{str(name)!r}]", f"not an option of {scheme}://{hint}"


def _hint(name: str, known: Iterable[str]) -> str:
    import difflib  # only needed on the way to a warning

    nearest = difflib.get_close_matches(name, sorted(known), 1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ", and does nothing"
