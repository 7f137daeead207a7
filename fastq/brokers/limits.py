"""What a publisher refuses before it reaches the broker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastq.errors import PublishError

if TYPE_CHECKING:
    from fastq.wire.message import Message


def check_sizes(messages: Sequence[Message], max_bytes: int) -> None:
    """Raise PublishError when a message is larger than ``fastq_max_message_bytes``: no worker would take it."""
    for message in messages:
        size = len(message.props) + len(message.body)
        if size > max_bytes:
            raise PublishError(
                f"not published: message {message.id} has {size} bytes, fastq_max_message_bytes allows {max_bytes}. "
                "Raise the setting here and at the workers, or pass a reference to the data"
            )
