"""RabbitMQ, for programs and for workers: connections, queues, publishing, consuming, remote control and events.

Bytes are ``wire.amqp`` and ``wire.frames``.
"""
