"""An application's own serializers, message signing among them: what kombu knows of them, for fastq's codecs."""

from __future__ import annotations

from typing import Any

import celery
from kombu import serialization

from fastq import codecs
from fastq.errors import DecodeError, EncodeError


class KombuCodec:
    """One of kombu's serializers as ours are."""

    def __init__(self, name: str) -> None:
        encoder = serialization.registry._encoders[name]
        self.name = name
        self.content_type: str = encoder.content_type
        self.content_encoding: str = encoder.content_encoding

    def encode(self, value: Any) -> bytes:
        """Return the value as bytes. Raises EncodeError."""
        try:
            _, _, data = serialization.dumps(value, serializer=self.name)
        except Exception as error:  # a serializer of anybody's
            raise EncodeError(f"{self.name} cannot write a {type(value).__name__}: {error}") from error
        return data.encode() if isinstance(data, str) else bytes(data)

    def decode(self, data: bytes) -> Any:
        """Return the value in the bytes. Raises DecodeError."""
        try:
            return serialization.loads(data, self.content_type, self.content_encoding, {self.content_type})
        except Exception as error:  # a serializer of anybody's, on bytes of anybody's
            raise DecodeError(f"{self.name} cannot read it: {error}") from error


def register_serializers(app: celery.Celery) -> None:
    """Make the serializers known that the application's settings name and that are not ours."""
    conf = app.conf
    _bound_yaml({*conf.accept_content, *(conf.result_accept_content or ()), conf.result_serializer})
    named = {conf.task_serializer, conf.result_serializer, conf.event_serializer, *conf.accept_content}
    for name in named:
        name = serialization.registry.type_to_name.get(name, name)
        if name in serialization.registry._encoders and not codecs.is_known(name):
            codecs.register(KombuCodec(name))


def _bound_yaml(accepted: set[str]) -> None:
    """Have kombu read YAML, where it is accepted, as we do: with aliases that do not multiply."""
    kind = codecs.CONTENT_TYPES["yaml"]
    if accepted.isdisjoint(("yaml", kind)):
        return
    # An application's own reader stays.
    if serialization.registry._decoders[kind].__module__ in ("kombu.serialization", "yaml"):
        serialization.registry._decoders[kind] = _read_yaml


def _read_yaml(data: Any) -> Any:
    return codecs.get("yaml").decode(bytes(data, "utf-8") if isinstance(data, str) else bytes(data))
