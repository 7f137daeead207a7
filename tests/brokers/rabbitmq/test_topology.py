"""Which queues are declared and how, and what the broker's refusals are turned into. No broker."""

from __future__ import annotations

from typing import Any

import pytest

from fastq.brokers.rabbitmq.refusal import refusal
from fastq.brokers.rabbitmq.url import AmqpUrl
from fastq.errors import ConnectionLost, FastqError, LocalProtocolError, PublishError, SettingsError
from fastq.queues import Topology, direct_queue, names_by_alias, read_by_default
from fastq.settings import Settings


def topology(queues: Any = None, **values: Any) -> Topology:
    settings = Settings(values)
    object.__setattr__(settings, "task_queues", queues)
    return Topology(settings)


def test_a_queue_is_declared_as_celery_does() -> None:
    assert list(topology().spec("mail").steps()) == [
        (
            "queue.declare",
            {"queue": "mail", "durable": True, "exclusive": False, "auto_delete": False, "arguments": {}},
        ),
        (
            "exchange.declare",
            {
                "exchange": "mail",
                "type": "direct",
                "passive": False,
                "durable": True,
                "auto_delete": False,
                "arguments": {},
            },
        ),
        ("queue.bind", {"queue": "mail", "exchange": "mail", "routing_key": "mail", "arguments": {}}),
    ]


def test_the_default_queue_type_is_named_only_when_it_is_not_classic() -> None:
    assert topology().spec("q").arguments == {}
    assert topology(task_default_queue_type="quorum").spec("q").arguments == {"x-queue-type": "quorum"}


def test_task_queues_may_say_more_about_a_queue() -> None:
    made = topology(
        [
            "plain",
            {"name": "safe", "queue_type": "quorum", "dead_letter_exchange": "dead", "dead_letter_routing_key": "d"},
            {"name": "fast", "max_priority": 9, "arguments": {"x-message-ttl": 1000}},
            {"name": "other", "exchange": "ex", "exchange_type": "topic", "routing_key": "#", "durable": False},
            {"name": "bare", "exchange": ""},
        ]
    )
    assert made.spec("plain").arguments == {}
    assert made.spec("safe").arguments == {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": "dead",
        "x-dead-letter-routing-key": "d",
    }
    assert made.spec("fast").arguments == {"x-max-priority": 9, "x-message-ttl": 1000}
    steps = dict(made.spec("other").steps())
    assert steps["exchange.declare"]["exchange"] == "ex"
    assert steps["exchange.declare"]["type"] == "topic"
    assert steps["exchange.declare"]["durable"] is False
    assert steps["queue.bind"] == {"queue": "other", "exchange": "ex", "routing_key": "#", "arguments": {}}
    assert [method for method, _ in made.spec("bare").steps()] == ["queue.declare"]


def test_task_queues_may_be_a_dict_in_celerys_words() -> None:
    made = topology({"q": {"exchange": "e", "routing_key": "k", "queue_arguments": {"x-max-priority": 3}}, "r": None})
    assert made.spec("q").arguments == {"x-max-priority": 3}
    assert made.spec("q").exchange == "e"
    assert made.may_create("r")


def test_a_queue_may_have_several_bindings() -> None:
    bindings = [
        {"exchange": "news", "exchange_type": "topic", "routing_key": "sport.#"},
        {"exchange": "amq.headers", "exchange_type": "headers", "arguments": {"x-match": "any", "kind": "sport"}},
        {"exchange": "theirs", "routing_key": "k", "exchange_no_declare": True},
    ]
    made = topology([{"name": "sport", "bindings": bindings, "exclusive": True}]).spec("sport")
    steps = list(made.steps())
    assert [method for method, _ in steps] == [
        "queue.declare",
        "exchange.declare",
        "queue.bind",
        "queue.bind",
        "queue.bind",
    ]
    assert steps[0][1]["exclusive"] is True
    assert steps[1][1]["exchange"] == "news"
    assert steps[1][1]["type"] == "topic"
    assert [(fields["exchange"], fields["routing_key"]) for method, fields in steps if method == "queue.bind"] == [
        ("news", "sport.#"),
        ("amq.headers", ""),
        ("theirs", "k"),
    ]
    assert steps[3][1]["arguments"] == {"x-match": "any", "kind": "sport"}
    beside = topology([{"name": "sport", "exchange": "own", "bindings": bindings[:1]}]).spec("sport")
    assert [each.exchange for each in beside.all_bindings] == ["own", "news"]


def test_an_exchange_may_differ_from_its_queue() -> None:
    options = {"durable": False, "exchange_durable": True, "exchange_auto_delete": True, "exchange_arguments": {"x": 1}}
    steps = dict(topology([{"name": "q", **options}]).spec("q").steps())
    assert steps["queue.declare"]["durable"] is False
    assert steps["exchange.declare"]["durable"] is True
    assert steps["exchange.declare"]["auto_delete"] is True
    assert steps["exchange.declare"]["arguments"] == {"x": 1}


def test_a_queue_that_is_not_ours_to_declare_has_no_steps() -> None:
    assert list(topology([{"name": "q", "no_declare": True}]).spec("q").steps()) == []


def test_a_queue_is_found_by_its_alias() -> None:
    made = topology([{"name": "bcast.1", "alias": "news", "exchange": "news", "exchange_type": "fanout"}])
    assert made.spec("news") is made.spec("bcast.1")
    assert names_by_alias([{"name": "bcast.1", "alias": "news"}, "plain"]) == {"news": "bcast.1"}


def test_what_is_only_declared_is_not_read_by_default() -> None:
    assert list(read_by_default(["a", {"name": "b", "consume": False}, {"name": "c", "consume": True}])) == ["a", "c"]


def test_missing_queues_may_have_a_type_of_their_own() -> None:
    made = topology(["known"], task_create_missing_queue_type="quorum", task_create_missing_queue_exchange_type="topic")
    assert made.spec("known").arguments == made.spec("celery").arguments == {}
    assert made.spec("new").arguments == {"x-queue-type": "quorum"}
    assert (made.spec("new").exchange_type, made.spec("known").exchange_type) == ("topic", "direct")


def test_a_workers_own_queue_hangs_on_celerys_exchange_for_such_queues() -> None:
    name = direct_queue("w1@host")
    made = topology(worker_direct=True, task_create_missing_queues=False)
    assert name == "w1@host.dq2"
    assert (made.spec(name).exchange, made.spec(name).routing_key) == ("C.dq2", "w1@host")
    assert made.may_create(name)
    assert topology().spec(name).exchange == name


def test_a_queues_own_arguments_win_over_the_default_ones() -> None:
    made = topology(
        [{"name": "q", "queue_type": "classic", "max_priority": 3}],
        task_default_queue_type="quorum",
        task_queue_max_priority=9,
    )
    assert made.spec("q").arguments == {"x-queue-type": "classic", "x-max-priority": 3}
    assert made.spec("r").arguments == {"x-queue-type": "quorum", "x-max-priority": 9}


@pytest.mark.parametrize(
    ("queues", "problem"),
    [
        ([{"name": "q", "max_prio": 3}], "unknown option 'max_prio'"),
        ([{"nam": "q"}], "neither"),
        ([3], "neither"),
        ([{"name": "q", "bindings": [{"exchange": "e", "key": "k"}]}], "unknown option 'key'"),
        ([{"name": "q", "bindings": [{"routing_key": "k"}]}], "names no exchange"),
    ],
)
def test_mistakes_in_task_queues_are_named(queues: Any, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        topology(queues)


def test_missing_queues_are_created_only_when_that_is_allowed() -> None:
    assert topology().may_create("anything")
    strict = topology(["known"], task_create_missing_queues=False)
    assert strict.may_create("known")
    assert strict.may_create("celery")
    assert not strict.may_create("anything")


@pytest.mark.parametrize(
    ("code", "text", "kind", "remedy"),
    [
        (403, "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN.", SettingsError, "password"),
        (
            403,
            "ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u'",
            SettingsError,
            "set_permissions",
        ),
        (404, "NOT_FOUND - no queue 'q' in vhost '/'", SettingsError, "task_create_missing_queues"),
        (405, "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'q'", SettingsError, "exclusively"),
        (406, "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'q'", SettingsError, "task_queues"),
        (
            406,
            "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out.",
            ConnectionLost,
            "consumer_timeout",
        ),
        (406, "PRECONDITION_FAILED - message size 200 is larger than configured max", PublishError, "max_message_size"),
        (406, "PRECONDITION_FAILED - unknown delivery tag 7", LocalProtocolError, "twice"),
        (530, "NOT_ALLOWED - vhost v not found", SettingsError, "add_vhost v"),
        (530, "NOT_ALLOWED - access to vhost 'v' refused for user 'u'", SettingsError, "set_permissions -p v u"),
        (320, "CONNECTION_FORCED - broker forced connection closure", ConnectionLost, "shutting down"),
        (504, "CHANNEL_ERROR - expected 'channel.open'", LocalProtocolError, "bug"),
    ],
)
def test_a_refusal_says_what_to_do(code: int, text: str, kind: type[FastqError], remedy: str) -> None:
    error = refusal(AmqpUrl("broker", user="u", password="secret", vhost="v"), {"reply_code": code, "reply_text": text})
    assert type(error) is kind
    assert remedy in str(error)
    assert text in str(error)
    assert "amqp://u:**@broker:5672/v" in str(error)
