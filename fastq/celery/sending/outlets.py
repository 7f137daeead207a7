"""The connections over which an accelerated application publishes: RabbitMQ and Redis, thread-safe and fork-aware.

Both raise FastqError when a message could not be sent. Queues are declared by kombu's own entities.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import celery
from kombu import Connection
from kombu.transport.base import to_rabbitmq_queue_arguments

from fastq.brokers import RABBITMQ, REDIS, try_broker
from fastq.brokers.rabbitmq.connection import ADMIN_CHANNEL, BlockingConnection
from fastq.brokers.rabbitmq.publisher import AmqpPublisher
from fastq.brokers.redis.behind import Backlog
from fastq.brokers.redis.blocking import BlockingRedis
from fastq.brokers.redis.layout import read_layout
from fastq.brokers.redis.publisher import unknown_fate
from fastq.brokers.redis.url import parse_redis_url
from fastq.errors import ConnectionLost, SettingsError
from fastq.net import forks
from fastq.settings import Settings
from fastq.wire.ids import new_uuid4
from fastq.wire.kombu import encode_push
from fastq.wire.message import Message

#: Chosen: a reply queue is declared again before a call when that was last done so many seconds ago.
REPLY_QUEUE_S = 1.0
#: kombu's, for Redis.
SOCKET_TIMEOUT_S = 120.0


class Outlet(Protocol):
    """Where the messages of an application go."""

    #: Whether exchanges other than the default one are for it.
    takes_exchanges: bool

    def send(self, message: Message, entities: Sequence[Any]) -> None:
        """Declare kombu's entities where that has not been done, and publish.

        Raises EncodeError for what only kombu can write, other FastqErrors when it could not be sent.
        """

    def declare_reply_queue(self, backend: Any) -> bool:
        """See to it that the queue for a caller's results is there; False when kombu has to do that."""

    def close(self) -> None:
        """Close the connection; a later message opens a new one."""


def open_outlet(app: celery.Celery, confirm_behind: bool) -> Outlet | None:
    """Return the outlet to an application's broker, None for a broker that is not for it. Raises SettingsError.

    ``confirm_behind``: go on before Redis has answered; of RabbitMQ nothing is waited for anyway, as in Celery.
    """
    url = write_url(app)
    broker = try_broker(url)
    settings = Settings()
    options: Mapping[str, Any] = app.conf.broker_transport_options or {}
    for name in ("broker_use_ssl", "broker_failover_strategy", "broker_login_method"):
        value = app.conf.get(name)
        if name in settings and value is not None:
            settings[name] = value
    settings.broker_transport_options = dict(options)
    settings.broker_connection_timeout = float(app.conf.broker_connection_timeout or 4.0)
    if broker is RABBITMQ:
        # As in Celery: nobody waits for a confirm that was not asked for.
        settings.broker_transport_options = {**options, "confirm_publish": bool(options.get("confirm_publish"))}
        return AmqpOutlet(url, settings)
    if broker is REDIS and options.get("body_encoding", "base64") == "base64":
        return RedisOutlet(url, settings, app, confirm_behind)
    return None


def write_url(app: celery.Celery) -> str:
    """Return the URL to which the application publishes, or several with ``;`` between. It may hold a password."""
    conf = app.conf
    url = conf.broker_write_url
    if isinstance(url, (list, tuple)):
        url = ";".join(url)
    parts = (conf.broker_user, conf.broker_password, conf.broker_vhost, conf.broker_port, conf.broker_transport)
    if url and "://" in url and not any(parts):
        return str(url)
    user, password, vhost, port, transport = parts
    # Bare host names and the parts that URLs replaced: kombu puts them together.
    return str(Connection(url, user, password, vhost, port, transport=transport).as_uri(include_password=True))


class DeclaringChannel:
    """What kombu's entities need of a channel to declare themselves, on a connection of ours."""

    def __init__(self, connection: BlockingConnection) -> None:
        self._connection = connection

    def prepare_queue_arguments(self, arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Return a queue's arguments under the broker's names."""
        prepared: dict[str, Any] = to_rabbitmq_queue_arguments(arguments, **options)
        return prepared

    def exchange_declare(self, exchange: str, **fields: Any) -> None:
        """Create an exchange if it is missing."""
        self._call("exchange.declare", exchange=exchange, **fields)

    def queue_declare(self, queue: str, **fields: Any) -> tuple[str, int, int]:
        """Create a queue if it is missing and return its name, messages and consumers."""
        found = self._call("queue.declare", queue=queue, **fields)
        return found["queue"], found["message_count"], found["consumer_count"]

    def queue_bind(self, queue: str, exchange: str, routing_key: str, **fields: Any) -> None:
        """Bind a queue to an exchange."""
        self._call("queue.bind", queue=queue, exchange=exchange, routing_key=routing_key or "", **fields)

    def exchange_bind(self, destination: str, source: str, routing_key: str, **fields: Any) -> None:
        """Bind an exchange to another one."""
        self._call("exchange.bind", destination=destination, source=source, routing_key=routing_key or "", **fields)

    def _call(self, method: str, **fields: Any) -> dict[str, Any]:
        fields["arguments"] = dict(fields.get("arguments") or {})
        fields["nowait"] = False
        return self._connection.rpc(ADMIN_CHANNEL, method, **fields)


class AmqpOutlet(AmqpPublisher):
    """RabbitMQ. It waits for confirms when the transport option ``confirm_publish`` is on."""

    takes_exchanges = True
    #: As in Celery: what no queue takes is dropped.
    mandatory = False

    def __init__(self, url: str, settings: Settings) -> None:
        super().__init__(url, settings)
        self._declared: set[tuple[type, str]] = set()
        self._reply_queues: dict[str, float] = {}

    def send(self, message: Message, entities: Sequence[Any]) -> None:
        """Declare what is missing on this connection and publish. Raises FastqError."""
        with self._lock:
            connection = self._ready()
            if connection.blocked is not None:
                raise ConnectionLost(f"RabbitMQ at {connection.url} blocks publishers: {connection.blocked}")
            try:
                for entity in entities:
                    if (type(entity), entity.name) not in self._declared:
                        self._declare(connection, entity)
                confirms = self._publish_one(connection, message)
            except BaseException:
                self._drop()
                raise
            if self._confirm:
                connection.used_at = time.monotonic()
            if confirms is not None:
                confirms.check()

    def declare_reply_queue(self, backend: Any) -> bool:
        """Declare the queue for the results of this thread's calls, at most once in a second."""
        with self._lock:
            connection = self._ready()
            now = time.monotonic()
            if now - self._reply_queues.get(backend.oid, -REPLY_QUEUE_S) >= REPLY_QUEUE_S:
                self._declare(connection, backend.binding)
                self._reply_queues[backend.oid] = now
        return True

    def _declare(self, connection: BlockingConnection, entity: Any) -> None:
        entity.declare(channel=DeclaringChannel(connection))
        if entity.can_cache_declaration:
            self._declared.add((type(entity), entity.name))

    def _declare_missing(self, connection: BlockingConnection, queue: str) -> None:
        """Nothing: the entities that come with a message are all that Celery declares."""

    def _connect(self) -> BlockingConnection:
        # The broker may be another one than before.
        self._declared, self._reply_queues = set(), {}
        return super()._connect()


class RedisOutlet:
    """Redis, in kombu's keys and envelope."""

    takes_exchanges = False

    def __init__(self, url: str, settings: Settings, app: celery.Celery, confirm_behind: bool) -> None:
        urls = parse_redis_url(url, settings)
        options = settings.broker_transport_options
        timeout_s = options.get("socket_timeout", SOCKET_TIMEOUT_S) or SOCKET_TIMEOUT_S
        connect_s, most = settings.broker_connection_timeout, settings.fastq_max_message_bytes
        self._redis = BlockingRedis(urls, float(timeout_s), "", connect_s, most)
        self._backlog = Backlog(self._redis, float(timeout_s)) if confirm_behind else None
        self._layout = read_layout(settings, urls[0].db)
        self._app = app
        self._declared: set[tuple[type, str]] = set()
        self._lock = threading.Lock()
        forks.register(self)

    def send(self, message: Message, entities: Sequence[Any]) -> None:
        """Have kombu declare what is new, and put the message into its queue's list. Raises FastqError."""
        for entity in entities:
            if (type(entity), entity.name) not in self._declared:
                self._declare(entity)
        command = encode_push(self._layout.list_of(message.routing_key, message.priority), message, new_uuid4())
        if self._backlog is not None:
            self._backlog.put([(message.id, command)])
            return
        with self._lock:
            self._redis.open()
            try:
                self._redis.expect(self._redis.ask(command), int)
            except ConnectionLost as error:
                raise unknown_fate(error) from None

    def declare_reply_queue(self, backend: Any) -> bool:
        """Nothing: False."""
        return False

    def _declare(self, entity: Any) -> None:
        if not entity.can_cache_declaration:
            raise SettingsError(f"queue {entity.name!r} expires: its messages are for kombu to send")
        with self._app.producer_or_acquire() as producer:
            producer.maybe_declare(entity)
        self._declared.add((type(entity), entity.name))

    def close(self) -> None:
        """Close the connection; a later message opens a new one."""
        if self._backlog is not None:
            self._backlog.close()
        with self._lock:
            self._redis.close()

    def after_fork(self) -> None:
        """In a forked child: another thread of the parent may have held the lock. The connection knows by itself."""
        self._lock = threading.Lock()
        self._declared = set()
