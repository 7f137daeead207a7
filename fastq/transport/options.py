"""Which names ``broker_transport_options`` may have for each kind of broker. No I/O.

Source: kombu 5.7, transports ``pyamqp`` and ``redis``, and its ``connection``; py-amqp 5.3, ``Connection``. What means
nothing here (pools of connections, polling) is known all the same, as it does no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastq.settings import Settings

#: What kombu's own connection reads, whatever the transport; ``confirm_publish`` is ours for Redis too.
_ALL = "confirm_publish connect_retries_timeout errback interval_max interval_start interval_step max_retries"
_AMQP = (
    "authentication bind_host channel_max client_properties confirm_timeout connect_timeout connection_errors "
    "fail_fast frame_handler frame_max frame_writer heartbeat host insist locale login_method login_response "
    "on_blocked on_open on_tune_ok on_unblocked password raise_on_initial_eintr read_timeout socket_settings ssl "
    "userid virtual_host write_timeout"
)
_REDIS = (
    "ack_emulation body_encoding brpop_timeout client_name connection_pool_class credential_provider "
    "deadletter_queue fanout_patterns fanout_prefix global_keyprefix health_check_interval master_name "
    "max_connections min_other_sentinels polling_interval priority_steps queue_order_strategy "
    "reauth_check_interval retry retry_on_error retry_on_timeout sentinel_fanout_compat sentinel_kwargs sep "
    "socket_connect_timeout socket_keepalive socket_keepalive_options socket_timeout unacked_index_key unacked_key "
    "unacked_mutex_expire unacked_mutex_key unacked_restore_interval unacked_restore_limit unacked_restore_throttle "
    "visibility_timeout"
)
_OF_SCHEME = {
    **dict.fromkeys(("amqp", "amqps", "pyamqp"), _AMQP),
    **dict.fromkeys(("redis", "rediss", "redis+socket", "sentinel"), _REDIS),
    **dict.fromkeys(("sqlite", "memory"), ""),
}


def unknown_options(settings: Settings) -> list[tuple[str, str]]:
    """Return (name, what to say of it) of each transport option that the broker in the settings does not have."""
    url = settings.broker_url
    first = url if isinstance(url, str) or url is None else next(iter(url), "")
    scheme = (first or "").partition("://")[0].lower()
    if scheme not in _OF_SCHEME:
        return []
    known = f"{_ALL} {_OF_SCHEME[scheme]}".split()
    return [
        (f"broker_transport_options[{str(name)!r}]", f"not an option of {scheme}://{_hint(str(name), known)}")
        for name in settings.broker_transport_options
        if name not in known
    ]


def _hint(name: str, known: Sequence[str]) -> str:
    import difflib  # only needed on the way to a warning

    nearest = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ", and does nothing"
