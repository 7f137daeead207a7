"""Redis as a broker, with kombu's keys and messages, and what talking to it takes, for result stores too.

Bytes to values and back is hiredis. Source: the RESP2 protocol
specification, so that any server from Redis 5 on will do.
"""
