"""What talking to RabbitMQ takes on either side of it: URLs, TLS, the handshake, queues, and one blocking connection.

Below ``transport`` and ``results``, which both use it. Bytes are ``wire.amqp`` and ``wire.frames``.
"""
