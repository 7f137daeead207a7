"""What the broker's close codes mean to a user: a clear error for each, with the broker's text and the remedy. No I/O.

Source: AMQP 0-9-1 specification 1.2 (reply codes), and the texts that RabbitMQ 3.10 to 4 send with them.
"""

from __future__ import annotations

from typing import Any

from fastq.brokers.rabbitmq.url import AmqpUrl
from fastq.errors import ConnectionLost, FastqError, LocalProtocolError, PublishError, SettingsError


def refusal(url: AmqpUrl, fields: dict[str, Any]) -> FastqError:
    """Return the error for a connection.close or channel.close with these fields."""
    code, text = fields["reply_code"], fields["reply_text"]
    said = f"RabbitMQ at {url} closed with {code} {text!r}"
    if code == 403:
        return SettingsError(f"{said}. {access_remedy(url, text)}")
    if code == 404:
        return SettingsError(f"{said}. Declare it first, or leave that to fastq with task_create_missing_queues = True")
    if code == 405:
        return SettingsError(f"{said}. Another connection owns it exclusively: stop that one, or use another name")
    if code == 406:
        return precondition(said, text)
    if code == 503 and "exchange type" in text:
        return SettingsError(f"{said}. Correct exchange_type, or enable the plugin that brings it")
    if code == 530:
        return SettingsError(f"{said}. {vhost_remedy(url, text)}")
    if code in (320, 506, 541):
        return ConnectionLost(f"{said}: it is shutting down or short of resources")
    return LocalProtocolError(
        f"{said}. This is a bug in fastq, unless something between it and the broker changes data"
    )


def access_remedy(url: AmqpUrl, text: str) -> str:
    """Return what to do about 403: wrong login, or a user without rights."""
    if "Login was refused" in text or "login refused" in text.lower():
        return f"Check user {url.user!r} and its password in broker_url; the user guest can log in from localhost only"
    return f"Grant the user its rights: rabbitmqctl set_permissions -p {url.vhost} {url.user} '.*' '.*' '.*'"


def vhost_remedy(url: AmqpUrl, text: str) -> str:
    """Return what to do about 530: a virtual host that is missing or not allowed."""
    if "not found" in text:
        return f"Create the virtual host (rabbitmqctl add_vhost {url.vhost}) or correct the path of broker_url"
    if "refused" in text:
        return f"Grant the user its rights: rabbitmqctl set_permissions -p {url.vhost} {url.user} '.*' '.*' '.*'"
    return "The broker does not allow this operation to this user"


def precondition(said: str, text: str) -> FastqError:
    """Return the error for 406, the code for several unlike things."""
    if "inequivalent arg" in text:
        return SettingsError(
            f"{said}. It exists with other arguments: give it the same ones in task_queues, "
            "or stop its users and delete it (rabbitmqctl delete_queue NAME) so that it is declared anew"
        )
    if "acknowledgement" in text and "timed out" in text:
        return ConnectionLost(f"{said}: a task ran longer than consumer_timeout allows; raise it in rabbitmq.conf")
    if "message size" in text:
        return PublishError(f"{said}. Send less, or raise max_message_size in rabbitmq.conf")
    if "unknown delivery tag" in text:
        return LocalProtocolError(f"{said}: something was acknowledged twice")
    return SettingsError(said)
