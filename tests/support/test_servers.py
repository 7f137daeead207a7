"""The private servers: they answer, restart on the same data, and leave nothing behind."""

from __future__ import annotations

import socket

import pytest

from tests.support.servers import RabbitMQ, Redis, ServerFailed, amqp_answers, free_ports


@pytest.mark.rabbitmq
def test_a_virtual_host_is_fresh_and_the_node_answers(rabbitmq: RabbitMQ, amqp_url: str, amqp_vhost: str) -> None:
    assert amqp_answers(rabbitmq.port)
    assert amqp_url.endswith(f"/{amqp_vhost}")
    assert rabbitmq.queue_depth(amqp_vhost, "celery") == -1
    assert amqp_vhost in rabbitmq.evaluate("rabbit_vhost:list_names()")


@pytest.mark.rabbitmq
def test_an_erlang_error_reaches_the_test(rabbitmq: RabbitMQ) -> None:
    with pytest.raises(ServerFailed, match="undef"):
        rabbitmq.evaluate("nowhere:nothing()")


@pytest.mark.rabbitmq
def test_publishers_are_blocked_by_the_memory_alarm(rabbitmq: RabbitMQ) -> None:
    rabbitmq.block_publishers()
    try:
        assert "resource_limit,memory" in rabbitmq.evaluate("rabbit_alarm:get_alarms()")
    finally:
        rabbitmq.unblock_publishers()
    assert rabbitmq.evaluate("rabbit_alarm:get_alarms()") == "[]"


@pytest.mark.redis
def test_redis_answers_and_restarts_on_its_port(redis_server: Redis) -> None:
    port = redis_server.port
    redis_server.restart()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"PING\r\n")
        assert connection.recv(16) == b"+PONG\r\n"


def test_ports_are_neighbours_outside_the_ephemeral_range() -> None:
    first = free_ports(3)
    assert 1024 < first < 32_768 - 3
