"""The start of an AMQP connection, connection.start to connection.open-ok: what to answer to what. No I/O.

Source: AMQP 0-9-1 specification 1.4, RabbitMQ's authentication and capability pages.
"""

from __future__ import annotations

import math
import platform
from typing import Any

from fastq.brokers.rabbitmq.refusal import refusal
from fastq.brokers.rabbitmq.url import AmqpUrl
from fastq.errors import ConnectionLost, RemoteProtocolError, SettingsError
from fastq.wire.amqp import METHODS, decode_method, encode_method, encode_table
from fastq.wire.frames import method_frame

FRAME_MAX = 131072  # RabbitMQ's own default, and what Celery asks for
FRAME_MIN = 4096  # specification 4.2.3
CHANNEL_MAX = 2047

#: What RabbitMQ may send to us beyond the specification.
CAPABILITIES = {
    "publisher_confirms": True,
    "basic.nack": True,
    "consumer_cancel_notify": True,
    "connection.blocked": True,
    "authentication_failure_close": True,
    "consumer_priorities": True,
    "exchange_exchange_bindings": True,
}


class Handshake:
    """One connection's start. Feed it the methods of channel 0 until ``is_open``."""

    def __init__(self, url: AmqpUrl, heartbeat_s: float, connection_name: str) -> None:
        self.url = url
        self.is_open = False
        self.frame_max = FRAME_MAX
        self.channel_max = CHANNEL_MAX
        self.heartbeat_s = math.ceil(heartbeat_s)  # whole seconds on the wire
        self.server_properties: dict[str, Any] = {}
        self._name = connection_name

    def answer(self, method_id: int, arguments: bytes) -> bytes:
        """Return the frames to send for a method of the broker. Raises SettingsError or ConnectionLost."""
        try:
            return self._answer(*decode_method(method_id, arguments))
        except RemoteProtocolError as error:
            raise SettingsError(f"{self.url} does not speak AMQP 0-9-1: {error}") from None

    def _answer(self, name: str, fields: dict[str, Any]) -> bytes:
        if name == "connection.start":
            return self._start(fields)
        if name == "connection.tune":
            return self._tune(fields)
        if name == "connection.open-ok":
            self.is_open = True
            return b""
        if name == "connection.close":
            raise refusal(self.url, fields)
        if name == "connection.secure":
            raise SettingsError(
                f"RabbitMQ at {self.url} wants a login in several steps; use PLAIN, AMQPLAIN or EXTERNAL"
            )
        raise RemoteProtocolError(f"{name} during the handshake")

    def _start(self, fields: dict[str, Any]) -> bytes:
        if fields["version_major"] != 0 or fields["version_minor"] not in (9, 91):
            version = f"{fields['version_major']}-{fields['version_minor']}"
            raise RemoteProtocolError(f"it speaks AMQP {version}")
        self.server_properties = fields["server_properties"]
        mechanism = self._choose(fields["mechanisms"].decode("ascii", "replace").split())
        return frame(
            "connection.start-ok",
            client_properties={
                "product": "fastq",
                "platform": f"Python {platform.python_version()}",
                "connection_name": self._name,
                "capabilities": CAPABILITIES,
            },
            mechanism=mechanism,
            response=self._response(mechanism),
            locale="en_US",
        )

    def _choose(self, offered: list[str]) -> str:
        """Return the mechanism to log in with. Raises SettingsError when the broker does not offer it."""
        wanted = [self.url.mechanism] if self.url.mechanism else ["PLAIN", "AMQPLAIN"]
        for mechanism in wanted:
            if mechanism in offered:
                return mechanism
        raise SettingsError(
            f"RabbitMQ at {self.url} offers the logins {', '.join(offered)}, fastq would use {' or '.join(wanted)}. "
            "Name another one with ?auth_mechanism= in broker_url"
        )

    def _response(self, mechanism: str) -> bytes:
        if mechanism == "EXTERNAL":
            return b""
        if mechanism == "AMQPLAIN":
            # The table without its size: the long string has one of its own.
            return encode_table({"LOGIN": self.url.user, "PASSWORD": self.url.password})[4:]
        return b"\0".join([b"", self.url.user.encode(), self.url.password.encode()])

    def _tune(self, fields: dict[str, Any]) -> bytes:
        # 0 from the broker means that it sets no limit.
        self.frame_max = min(fields["frame_max"] or FRAME_MAX, FRAME_MAX)
        if self.frame_max < FRAME_MIN:
            raise RemoteProtocolError(f"it allows frames of {self.frame_max} bytes, fewer than {FRAME_MIN}")
        self.channel_max = min(fields["channel_max"] or CHANNEL_MAX, CHANNEL_MAX)
        # Ours decides: RabbitMQ takes the client's word, and 0 (a blocking client that cannot send any) turns it off.
        tune = {"channel_max": self.channel_max, "frame_max": self.frame_max, "heartbeat": self.heartbeat_s}
        return frame("connection.tune-ok", **tune) + frame("connection.open", virtual_host=self.url.vhost)


def frame(method: str, channel: int = 0, /, **fields: Any) -> bytes:
    """Return a method as a frame."""
    return method_frame(channel, METHODS[method], encode_method(METHODS[method], **fields))


def closed_early(url: AmqpUrl) -> ConnectionLost:
    """Return the error for a peer that hangs up before the connection is open."""
    return ConnectionLost(
        f"{url} closed the connection during the handshake: "
        "it is no RabbitMQ, or expects TLS (amqps://), or is just starting"
    )
