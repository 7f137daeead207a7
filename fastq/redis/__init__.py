"""What talking to Redis takes on either side of it: URLs, TLS, logging in, a blocking connection and one on a loop.

Below ``transport`` and ``results``, which both use it. Bytes to values and back is hiredis; no keys, no messages.
Source: the RESP2 protocol specification, so that any server from Redis 5 on will do.
"""
