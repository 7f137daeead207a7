"""Bytes and places: serializers, compression, signatures, protocol 1, priorities, routes, and the messages, replies and
stored results that a worker writes, field by field.
"""

from __future__ import annotations

import datetime
import decimal
import json
import re
import socket
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from celery.security.certificate import Certificate
from celery.security.key import PrivateKey
from celery.security.serialization import SecureSerializer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from tests.celery.conftest import OpenStage, stages
from tests.celery.proj.errors import PlainError
from tests.celery.proj.wire import CAUGHT
from tests.celery.stage import CeleryStage, Servers, opened
from tests.support.servers import wait_until

TASKS = "tests.celery.proj.tasks"
WIRE = "tests.celery.proj.wire"
ACCEPTED = ["json", "pickle", "yaml", "msgpack"]


@pytest.fixture(scope="module", params=stages(("amqp", "rpc"), ("redis", "redis")))
def stage(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryStage]:
    with opened(servers, tmp_path_factory, *request.param, accept_content=ACCEPTED) as stage:
        stage.start_worker()
        yield stage


# --- serializers and compression --------------------------------------------------------------------------------------

PLAIN = {"text": "ä\u2028\U0001f600", "numbers": [0, -1, 2.5], "none": None, "yes": True, "nested": {"a": [{}]}}


@pytest.mark.parametrize("serializer", ACCEPTED)
@pytest.mark.parametrize("compression", [None, "zlib", "bzip2", "lzma", "brotli", "zstd"])
def test_arguments_in_every_format(stage: CeleryStage, serializer: str, compression: str | None) -> None:
    result = stage.tasks.identity.apply_async((PLAIN,), serializer=serializer, compression=compression)
    assert stage.get(result) == PLAIN


@pytest.mark.parametrize("serializer", ["json", "pickle", "yaml", "msgpack"])
def test_a_worker_sends_in_every_format(stage: CeleryStage, serializer: str) -> None:
    result = stage.tasks.publish_in_formats.delay(serializer, "zlib" if serializer == "json" else None)
    stage.get(result)
    (child,) = result.children
    stage.worker.wait_for_log(rf"{TASKS}\.nothing\[{child.id}\] succeeded")


SPECIAL = [
    # value, how it arrives by JSON
    (datetime.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=datetime.timezone.utc), "datetime.datetime"),
    (datetime.date(2026, 1, 2), "datetime.date"),
    (decimal.Decimal("1.10"), "decimal.Decimal"),
    (uuid.UUID(int=5), "uuid.UUID"),
    (b"\x00\xff", "builtins.bytes"),
    ((1, 2), "builtins.list"),
]


@pytest.mark.parametrize(("value", "kind"), SPECIAL, ids=lambda value: value if isinstance(value, str) else "")
def test_values_that_json_has_no_word_for(stage: CeleryStage, value: Any, kind: str) -> None:
    assert stage.get(stage.tasks.kind_of.delay(value)) == kind
    returned = stage.get(stage.tasks.identity.delay(value))
    assert returned == (list(value) if isinstance(value, tuple) else value)


def test_pickle_carries_any_object(stage: CeleryStage) -> None:
    value = {(1, 2): {3, 4}, "e": PlainError("x")}
    assert stage.get(stage.tasks.show.apply_async((value,), serializer="pickle")) == repr(value)


@pytest.mark.parametrize("kind", stages(("amqp", "rpc"), ("redis", "redis")))
@pytest.mark.parametrize(("serializer", "compression"), [("pickle", "zlib"), ("msgpack", None)])
def test_results_in_other_formats(
    open_stage: OpenStage, kind: tuple[Any, ...], serializer: str, compression: str | None
) -> None:
    stage = open_stage(
        *kind,
        accept_content=ACCEPTED,
        result_serializer=serializer,
        result_compression=compression if kind[2] == "redis" else None,  # rpc:// has no word for it
        task_serializer=serializer,
    )
    stage.start_worker("-c", "1")
    value = [1, {"a": b"\x00"}]
    assert stage.get(stage.tasks.identity.delay(value)) == value
    error = stage.error(stage.tasks.fail.delay("TwoArguments", 5, "five"))
    assert error.args == (5, "five")


@pytest.mark.parametrize("kind", stages(("amqp", "rpc")))
def test_content_that_is_not_accepted_is_dropped(open_stage: OpenStage, kind: tuple[Any, ...]) -> None:
    stage = open_stage(*kind)
    stage.start_worker("-c", "1")
    stage.tasks.note_time.apply_async(("pickled",), serializer="pickle")
    assert stage.get(stage.tasks.add.delay(1, 1)) == 2
    stage.wait_for_empty()
    assert stage.notes("ran", mark="pickled") == []
    stage.worker.wait_for_log("Refusing to deserialize")


# --- signing ----------------------------------------------------------------------------------------------------------


def make_key(folder: Path) -> dict[str, str]:
    """Write a key and its certificate into the folder and return the settings that name them."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fleet")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, plain)
    )
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return {
        "security_key": str(folder / "key.pem"),
        "security_certificate": str(folder / "certificate.pem"),
        "security_cert_store": str(folder / "cert*.pem"),
    }


@pytest.mark.usefixtures("own_serializers")
@pytest.mark.parametrize("kind", stages(("amqp", "rpc"), ("redis", "redis")))
def test_signed_messages(open_stage: OpenStage, kind: tuple[Any, ...], tmp_path: Path) -> None:
    signed = dict.fromkeys(("task_serializer", "result_serializer", "event_serializer"), "auth")
    stage = open_stage(*kind, extras=("auth",), accept_content=["auth"], **signed, **make_key(tmp_path))
    stage.start_worker("-c", "1")
    stage.client.setup_security()
    assert stage.get(stage.tasks.add.delay(2, 3)) == 5
    assert type(stage.error(stage.tasks.fail.delay("PlainError"))) is PlainError


# --- protocol 1 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", stages(("amqp", "rpc"), ("redis", "redis")))
def test_calls_of_protocol_1(open_stage: OpenStage, kind: tuple[Any, ...]) -> None:
    stage = open_stage(*kind, task_protocol=1)
    stage.start_worker("-c", "1")
    t = stage.tasks
    assert stage.get(t.add.apply_async((1,), {"y": 2})) == 3
    assert stage.get(t.retry_until.delay(2)) == 2
    assert type(stage.error(t.fail.delay("PlainError"))) is PlainError
    assert stage.get(t.add.apply_async((1, 2), link=t.keep.s("protocol 1"))) == 3
    assert stage.wait_for_notes("kept", label="protocol 1")[0]["value"] == 3
    assert stage.get((t.add.s(1, 2) | t.double.s()).apply_async()) == 6
    assert stage.get(t.wait_for_soft_limit.apply_async((True,), soft_time_limit=0.5)) == "caught"
    found = stage.get(t.dump_request.apply_async((1,), {"key": "value"}, countdown=0.1, task_id="one"))
    names = ("id", "args", "kwargs", "retries", "utc", "called_directly", "timelimit", "group", "chord", "errbacks")
    assert {name: found[name] for name in names} == {
        "id": "one",
        "args": [1],
        "kwargs": {"key": "value"},
        "retries": 0,
        "utc": None,
        "called_directly": False,
        "timelimit": [None, None],
        "group": None,
        "chord": None,
        "errbacks": None,
    }


# --- messages as other clients write them -----------------------------------------------------------------------------


def publish(stage: CeleryStage, body: Any, **properties: Any) -> None:
    with stage.client.producer_pool.acquire() as producer:
        stage.client.backend.on_task_call(producer, properties["correlation_id"])  # listen for the result
        producer.publish(body, **{"routing_key": "celery", "exchange": "", "serializer": "json", **properties})


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ([[1, 2], {}, {}], {"task": f"{TASKS}.add"}),
        ([[1], {"y": 2}, {"callbacks": None}], {"lang": "js", "task": f"{TASKS}.add", "argsrepr": "x"}),
        ([[1, 2], {}, None], {"task": f"{TASKS}.add", "retries": 0, "timelimit": [None, None], "eta": None}),
        ({"task": f"{TASKS}.add", "args": [1, 2]}, {}),
        ({"task": f"{TASKS}.add", "args": [1], "kwargs": {"y": 2}, "retries": 0, "eta": None, "expires": None}, {}),
    ],
    ids=["bare", "other language", "no embed", "protocol 1 bare", "protocol 1"],
)
def test_sparse_messages_of_other_clients_run(stage: CeleryStage, body: Any, headers: dict[str, Any]) -> None:
    task_id = str(uuid.uuid4())
    result = stage.client.AsyncResult(task_id)
    if headers:
        headers = {**headers, "id": task_id}
    else:
        body = {**body, "id": task_id}
    publish(stage, body, headers=headers, correlation_id=task_id, reply_to=stage.client.thread_oid)
    assert stage.get(result) == 3


@pytest.mark.parametrize("task_id", [7, 1 << 70, 1.5, ["a"], {"a": 1}, None, "x" * 300, "caf\udce9", ""])
def test_a_message_of_protocol_1_with_an_odd_id_is_refused(stage: CeleryStage, task_id: Any) -> None:
    if stage.runner != "fastq":
        return  # Celery's worker ends at some of them
    refused = stage.worker.log().count("Rejected malformed message")
    body = {"task": f"{TASKS}.add", "id": task_id, "args": [1, 2], "kwargs": {}}
    with stage.client.producer_pool.acquire() as producer:
        producer.publish(json.dumps(body), routing_key="celery", exchange="", content_type="application/json",
                         content_encoding="utf-8", serializer=None)  # fmt: skip
    assert stage.get(stage.tasks.add.delay(1, 2)) == 3
    log = stage.worker.log()
    assert "internal error" not in log
    assert "Traceback" not in log
    is_refused = log.count("Rejected malformed message") == refused + 1
    assert is_refused or (isinstance(task_id, str) and task_id)


def send_as_text(stage: CeleryStage, body: str, task: str = "identity", **headers: Any) -> AsyncResult:
    """Publish a call whose body is this text, with more headers."""
    task_id = str(uuid.uuid4())
    headers = {"task": f"{TASKS}.{task}", "id": task_id, **headers}
    publish(
        stage, body, headers=headers, correlation_id=task_id, reply_to=stage.client.thread_oid,
        content_type="application/json", content_encoding="utf-8", serializer=None,
    )  # fmt: skip
    return stage.client.AsyncResult(task_id)


UNHEARD_OF = [float("nan"), {"v": [1.0, float("inf"), -float("inf")]}, "caf\udce9", {"\udce9": "\ud800 "}]


@pytest.mark.parametrize("value", UNHEARD_OF, ids=range(len(UNHEARD_OF)))
def test_what_only_pythons_json_reads_arrives_and_comes_back(stage: CeleryStage, value: Any) -> None:
    assert repr(stage.get(stage.tasks.identity.delay(value))) == repr(value)
    assert repr(stage.get(stage.tasks.identity.apply_async((), {"value": value}))) == repr(value)
    chain = stage.tasks.identity.s(value) | stage.tasks.identity.s()
    assert repr(stage.get(chain.apply_async())) == repr(value)


def test_a_number_beyond_the_range_of_floats_arrives_as_infinity(stage: CeleryStage) -> None:
    assert stage.get(send_as_text(stage, "[[[1e400, -1e999]], {}, {}]")) == [float("inf"), -float("inf")]


def test_headers_may_hold_what_only_pythons_json_reads(stage: CeleryStage) -> None:
    name = {"name": "caf\udce9", "more": ["\ud800", 1.5]}
    # RabbitMQ itself does not take numbers that are none.
    headers = {"mark": name} if stage.broker == "amqp" else {"mark": name, "number": float("nan")}
    found = stage.get(stage.tasks.dump_request.apply_async((), {}, headers=headers))
    assert found["headers"]["mark"] == name


def test_remote_control_takes_and_says_numbers_that_are_none(stage: CeleryStage) -> None:
    control = stage.client.control
    [reply] = control.broadcast("ping", arguments={"x": float("nan")}, reply=True, limit=1, timeout=20)
    assert [*reply.values()] == [{"ok": "pong"}]
    result = stage.tasks.identity.apply_async(([float("nan"), "caf\udce9"],), countdown=600)

    def scheduled() -> list[Any]:
        [reply] = control.broadcast("scheduled", reply=True, limit=1, timeout=20)
        [requests] = reply.values()
        return [each["request"]["args"] for each in requests if each["request"]["id"] == result.id]

    wait_until(lambda: bool(scheduled()), 20, lambda: AssertionError(stage.logs()))
    assert repr(scheduled()) == repr([[[float("nan"), "caf\udce9"]]])
    result.revoke()


@pytest.mark.parametrize("kind", stages(("amqp", "rpc")))
def test_an_id_may_be_any_text_that_the_store_takes(open_stage: OpenStage, kind: tuple[Any, ...]) -> None:
    stage = open_stage(*kind)
    stage.start_worker("-c", "1")
    task_id = f"caf\udce9-{uuid.uuid4()}"
    result = stage.tasks.dump_request.apply_async((), {}, task_id=task_id)
    assert stage.get(result)["id"] == task_id


DUE = [
    "2020-01-02T03:04Z",
    "2020-01-02",
    "20200102T030405",
    "2020-W01-4",
    "2020-01-02T03:04:05,5+01",
    "1960-01-01T00:00:00z",
]


def test_a_time_may_have_any_form_that_celery_reads(stage: CeleryStage) -> None:
    results = [send_as_text(stage, "[[1], {}, {}]", eta=text, expires="2999-W01", retries="1") for text in DUE]
    assert [stage.get(result) for result in results] == [1] * len(DUE)
    expired = [send_as_text(stage, "[[1], {}, {}]", expires=text) for text in DUE]
    assert [type(stage.error(result)) for result in expired] == [TaskRevokedError] * len(DUE)


def test_numbers_written_as_text_count_as_numbers(stage: CeleryStage) -> None:
    if stage.runner == "celery":
        pytest.skip("Celery's worker dies of such a limit, and its retry of such a number")
    result = send_as_text(stage, "[[2], {}, {}]", task="retry_until", retries="1", timelimit=["5", None])
    assert stage.get(result) == 2
    result = send_as_text(stage, "[[], {}, {}]", task="dump_request", retries="1", timelimit=["5", "2.5"])
    found = stage.get(result)
    assert (found["retries"], found["timelimit"]) == (1, [5.0, 2.5])
    late = send_as_text(stage, "[[false], {}, {}]", task="wait_for_soft_limit", timelimit=[None, "0.1"])
    assert type(stage.error(late)).__name__ == "SoftTimeLimitExceeded"


def test_what_follows_a_call_may_go_by_the_names_of_headers(stage: CeleryStage) -> None:
    odd = '{"timelimit": ["x", {}, "y"], "retries": "x", "group": [], "hostname": {}}'
    results = [send_as_text(stage, f"[[{number}], {{}}, {odd}]") for number in range(3)]
    assert [stage.get(result) for result in results] == [0, 1, 2]


@pytest.mark.parametrize("kind", stages(("amqp", "rpc")))
def test_times_of_protocol_1_in_yaml(open_stage: OpenStage, kind: tuple[Any, ...]) -> None:
    stage = open_stage(*kind, accept_content=["yaml", "json"])
    stage.start_worker("-c", "1")
    task_id = str(uuid.uuid4())
    body = (
        f"{{task: {TASKS}.add, id: {task_id}, args: [1, 2], eta: 2020-01-02T03:04:05Z, expires: 2999-01-01T00:00:00Z}}"
    )
    publish(
        stage, body, headers={}, correlation_id=task_id, reply_to=stage.client.thread_oid,
        content_type="application/x-yaml", content_encoding="utf-8", serializer=None,
    )  # fmt: skip
    assert stage.get(stage.client.AsyncResult(task_id)) == 3


# --- routes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", stages(("amqp", "rpc"), ("redis", "redis")))
def test_routes_queues_direct_and_broadcast(open_stage: OpenStage, kind: tuple[Any, ...]) -> None:
    stage = open_stage(
        *kind,
        proj_queues=[
            {"name": "celery"},
            {"name": "left"},
            {"name": "right", "routing_key": "to.the.right"},
            {"name": "everybody", "kind": "broadcast"},
        ],
        task_routes={f"{TASKS}.note_time": {"queue": "left"}, "tests.celery.proj.canvas.*": {"queue": "right"}},
        worker_direct=True,
    )
    stage.start_worker("-c", "1", "-n", "one@%h", "-Q", "celery,left,everybody")
    stage.start_worker("-c", "1", "-n", "two@%h", "-Q", "right,everybody")
    t = stage.tasks
    host = socket.gethostname()

    def node(**options: Any) -> str:
        return str(stage.get(t.dump_task.apply_async(**options))["hostname"])

    assert node() == f"one@{host}"
    assert node(queue="left") == f"one@{host}"
    assert node(queue="right") == f"two@{host}"
    direct = {"exchange": "C.dq2", "routing_key": f"two@{host}"}
    assert node(**direct) == f"two@{host}"
    stage.get(t.note_time.delay("routed"))
    assert stage.wait_for_notes("ran", mark="routed")[0]["queue"] == "left"
    assert stage.get(t.double.delay(4)) == 8
    stage.workers[1].wait_for_log(r"canvas\.double\[")
    # A client on Redis knows an exchange's type once it has declared it.
    t.note_time.apply_async(("to all",), queue="everybody", declare=[kombu.Exchange("everybody", type="fanout")])
    assert len({note["pid"] for note in stage.wait_for_notes("ran", 2, mark="to all")}) == 2


@pytest.mark.parametrize("kind", stages(("amqp", "rpc"), ("redis", "redis")))
def test_urgent_calls_go_first(open_stage: OpenStage, kind: tuple[Any, ...]) -> None:
    stage = open_stage(*kind, task_queue_max_priority=9, worker_prefetch_multiplier=1, task_acks_late=True)
    # RabbitMQ: 9 is the most urgent. Redis: 0 is.
    priorities = [0, 3, 6, 9] if kind[1] == "amqp" else [9, 6, 3, 0]
    results = [stage.tasks.note_time.apply_async((priority,), priority=priority) for priority in priorities * 2]
    stage.start_worker("-c", "1")
    for result in results:
        stage.get(result)
    marks = [note["mark"] for note in stage.notes("ran")]
    assert marks == sorted(priorities * 2, reverse=kind[1] == "amqp")


# --- what a worker publishes ------------------------------------------------------------------------------------------


def caught(stage: CeleryStage) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return headers, properties and body of the message in the caught queue."""
    (message,) = stage.take(CAUGHT)
    properties = {
        name: message.properties.get(name)
        for name in ("correlation_id", "delivery_mode", "priority", "expiration", "reply_to")
    }
    properties |= {"content_type": message.content_type, "content_encoding": message.content_encoding}
    return dict(message.headers), properties, message.payload


def plain_headers(task_id: str, **changed: Any) -> dict[str, Any]:
    return {
        "lang": "py",
        "task": f"{TASKS}.add",
        "id": task_id,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": task_id,
        "parent_id": None,
        "argsrepr": "(1,)",
        "kwargsrepr": "{'y': 'ä'}",
        "origin": "gen@test",
        "ignore_result": False,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
        **changed,
    }


UNSET_PRIORITY = {"amqp": None, "redis": 0}
EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def test_a_call_from_a_task_field_by_field(stage: CeleryStage) -> None:
    parent = stage.tasks.publish.apply_async(root_id="the root")
    task_id = stage.get(parent)
    headers, properties, body = caught(stage)
    assert headers == plain_headers(task_id, root_id="the root", parent_id=parent.id)
    assert body == [[1], {"y": "ä"}, EMBED]
    assert re.fullmatch(r"[0-9a-f-]{36}", properties.pop("reply_to"))
    assert properties == {
        "correlation_id": task_id,
        "delivery_mode": 2,
        "priority": UNSET_PRIORITY[stage.broker],
        "expiration": None,
        "content_type": "application/json",
        "content_encoding": "utf-8",
    }


def test_options_of_a_call_from_a_task_field_by_field(stage: CeleryStage) -> None:
    options = {"priority": 5, "time_limit": 9, "shadow": "s", "headers": {"tenant": "x"}, "ignore_result": True}
    parent = stage.tasks.publish.apply_async(kwargs={**options, "expires": 300, "countdown": 60})
    task_id = stage.get(parent)
    headers, properties, _ = caught(stage)
    eta, expires = (datetime.datetime.fromisoformat(headers.pop(name)) for name in ("eta", "expires"))
    assert datetime.timedelta(seconds=239) < expires - eta < datetime.timedelta(seconds=241)
    expected = plain_headers(
        task_id,
        root_id=parent.id,
        parent_id=parent.id,
        timelimit=[9, None],
        shadow="s",
        ignore_result=True,
        tenant="x",
    )
    assert headers == {name: value for name, value in expected.items() if name not in {"eta", "expires"}}
    assert properties["priority"] == 5
    if stage.broker == "amqp":
        assert properties["expiration"] == "300000"


def test_a_retry_field_by_field(stage: CeleryStage) -> None:
    t = stage.tasks
    call = t.publish_retry.apply_async(
        (7,),
        headers={"tenant": "x"},
        link=t.nothing.si(),
        link_error=t.nothing.si(),
        time_limit=99,
        shadow="shown",
        priority=3,
        root_id="the root",
        parent_id="the parent",
    )
    headers, properties, body = caught(stage)
    assert datetime.datetime.fromisoformat(headers.pop("eta")) > datetime.datetime.now(datetime.timezone.utc)
    assert re.fullmatch(r"gen\d+@\S+", headers.pop("origin"))
    kept = {
        "lang": "py",
        "task": f"{WIRE}.publish_retry",
        "id": call.id,
        "shadow": "shown",
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 1,
        "timelimit": [99, None],
        "root_id": "the root",
        "parent_id": "the parent",
        "argsrepr": "(7,)",
        "kwargsrepr": "{}",
        "ignore_result": False,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
        "tenant": "x",
    }
    assert {name: headers.get(name) for name in kept} == kept
    assert (properties["correlation_id"], properties["priority"]) == (call.id, 3)
    assert properties["reply_to"] == stage.client.thread_oid
    args, kwargs, embed = body
    assert (args, kwargs) == ([7], {})
    assert [one["task"] for one in (*embed["callbacks"], *embed["errbacks"])] == [f"{TASKS}.nothing"] * 2


def test_a_callback_field_by_field(stage: CeleryStage) -> None:
    t = stage.tasks
    link = t.add.s(2).set(queue=CAUGHT)
    parent = t.add.apply_async((1, 1), link=link, priority=4)
    headers, properties, body = caught(stage)
    assert (headers["task"], headers["parent_id"], headers["root_id"]) == (f"{TASKS}.add", parent.id, parent.id)
    assert body == [[2, 2], {}, EMBED]
    assert properties["priority"] == UNSET_PRIORITY[stage.broker]  # unless task_inherit_parent_priority


def test_the_next_step_of_a_chain_field_by_field(stage: CeleryStage) -> None:
    t = stage.tasks
    result = (t.add.s(1, 1) | t.add.s(2).set(queue=CAUGHT) | t.double.s()).apply_async()
    headers, properties, body = caught(stage)
    first, second = result.parent.parent.id, result.parent.id
    assert (headers["id"], headers["parent_id"], headers["root_id"]) == (second, first, first)
    assert properties["reply_to"] == stage.client.thread_oid
    args, kwargs, embed = body
    assert (args, kwargs) == ([2, 2], {})
    assert [step["options"]["task_id"] for step in embed["chain"]] == [result.id]


def test_a_replacement_field_by_field(stage: CeleryStage) -> None:
    call = stage.tasks.publish_replacement.apply_async(headers={"tenant": "x"})
    headers, _, body = caught(stage)
    assert (headers["id"], headers["task"], headers["replaced_task_nesting"]) == (call.id, f"{TASKS}.add", 1)
    assert headers["root_id"] == call.id
    assert body[0] == [5, 5]


def test_an_errback_field_by_field(stage: CeleryStage) -> None:
    t = stage.tasks
    call = t.fail_for_errback.apply_async(link_error=t.error_by_id.s().set(queue=CAUGHT))
    headers, _, body = caught(stage)
    assert (headers["task"], headers["root_id"], headers["parent_id"]) == (
        "tests.celery.proj.canvas.error_by_id",
        call.id,
        call.id,
    )
    assert body[:2] == [[call.id], {}]


# --- what a worker stores ---------------------------------------------------------------------------------------------


def meta_of(stage: CeleryStage, task_id: str, reply_to: str) -> dict[str, Any]:
    """Return the stored result, or the reply, as its JSON says."""
    if stage.backend == "redis":
        with stage.redis() as redis:
            stage.until(lambda: bool(redis.exists(f"celery-task-meta-{task_id}")), "the result is stored")
            assert 86_000 < redis.ttl(f"celery-task-meta-{task_id}") <= 86_400
            return dict(json.loads(redis.get(f"celery-task-meta-{task_id}")))
    (message,) = stage.take(reply_to)
    assert message.properties["correlation_id"] == task_id
    assert message.properties["delivery_mode"] == 1
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
    return dict(json.loads(message.body))


def send_for_meta(stage: CeleryStage, name: str, *args: Any, **options: Any) -> dict[str, Any]:
    """Run a task whose reply goes to a queue of the test's own and return what was stored."""
    reply_to = f"replies-{uuid.uuid4().hex[:8]}"
    if stage.broker == "amqp":
        with stage.client.connection_for_write() as connection:
            connection.SimpleQueue(reply_to).close()
    task_id = stage.send(name, *args, reply_to=reply_to, **options).id
    meta = meta_of(stage, task_id, reply_to)
    assert meta.pop("task_id") == task_id
    return meta


def test_a_stored_value_field_by_field(stage: CeleryStage) -> None:
    meta = send_for_meta(stage, "add", 1, 2)
    done = datetime.datetime.fromisoformat(meta.pop("date_done"))
    assert abs(done - datetime.datetime.now(datetime.timezone.utc)) < datetime.timedelta(minutes=1)
    assert meta == {"status": "SUCCESS", "result": 3, "traceback": None, "children": []}


def test_a_stored_error_field_by_field(stage: CeleryStage) -> None:
    meta = send_for_meta(stage, "fail", "TwoArguments", 5, "five")
    meta.pop("date_done")
    assert meta.pop("traceback").splitlines()[-1] == "tests.celery.proj.errors.TwoArguments: (5, 'five')"
    assert meta == {
        "status": "FAILURE",
        "result": {
            "exc_type": "TwoArguments",
            "exc_message": [5, "five"],
            "exc_module": "tests.celery.proj.errors",
        },
        "children": [],
    }


def test_a_stored_value_with_parent_and_group(stage: CeleryStage) -> None:
    meta = send_for_meta(stage, "add", 1, 2, parent_id="the parent", group_id="the group", root_id="the root")
    meta.pop("date_done")
    assert meta == {
        "status": "SUCCESS",
        "result": 3,
        "traceback": None,
        "children": [],
        "parent_id": "the parent",
        "group_id": "the group",
    }


@pytest.mark.parametrize("kind", stages(("amqp", "database")))
def test_a_row_of_the_result_table(open_stage: OpenStage, kind: tuple[Any, ...]) -> None:
    stage = open_stage(*kind, result_extended=True)
    stage.start_worker("-c", "1")
    result = stage.tasks.add.delay(1, 2)
    assert stage.get(result) == 3
    failed = stage.tasks.fail.delay("PlainError", "x")
    assert type(stage.error(failed)) is PlainError
    connection = sqlite3.connect(stage.folder / "results.db")
    connection.row_factory = sqlite3.Row
    try:
        (row,) = connection.execute("SELECT * FROM celery_taskmeta WHERE task_id = ?", (result.id,))
    finally:
        connection.close()
    names = ("status", "traceback", "name", "worker", "retries", "queue")
    assert {name: row[name] for name in names} == {
        "status": "SUCCESS",
        "traceback": None,
        "name": f"{TASKS}.add",
        "worker": f"celery@{socket.gethostname()}",
        "retries": 0,
        "queue": "celery",
    }
    assert json.loads(row["args"]) == [1, 2]


# --- refused messages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["rpc", "redis", "database"])
def test_who_waits_for_a_refused_message_is_told(open_stage: OpenStage, backend: Any) -> None:
    """Under Celery itself such a message is dropped, and who waits for it waits for ever."""
    stage = open_stage("fastq", "amqp" if backend == "rpc" else "redis", backend)
    stage.start_worker("-c", "1", settings={"fastq_max_message_bytes": 1 << 20})
    refused = {
        "content-type": stage.tasks.identity.apply_async((1,), serializer="pickle"),
        "timelimit": stage.tasks.identity.apply_async((1,), time_limit=-1),
        "json": _raw(stage, "[[1"),
        "args": _raw(stage, '[{"a": 1}, {}, {}]'),
    }
    if stage.broker == "amqp":  # of one in Redis that is too long not even the id is read
        refused["oversized"] = _raw(stage, json.dumps([["x" * (1 << 20)], {}, {}]))
    for kind, result in refused.items():
        error = stage.error(result)
        assert f"class={kind})" in str(error)
        assert type(error).__name__ == ("ContentDisallowed" if kind == "content-type" else "InvalidTaskError")
    log = stage.worker.log()
    assert "Rejected unaccepted message: class=content-type" in log
    assert "accept_content" in log
    assert log.count("Rejected malformed message") == len(refused) - 1
    ignored = stage.tasks.identity.apply_async((1,), serializer="pickle", ignore_result=True)
    assert stage.get(stage.tasks.identity.delay(2)) == 2
    assert stage.client.AsyncResult(ignored.id).state == "PENDING"


@pytest.mark.usefixtures("own_serializers")
@pytest.mark.parametrize("kind", [("fastq", "amqp", "rpc"), ("fastq", "redis", "redis")])
def test_who_waits_for_a_message_with_a_bad_signature_is_told(
    open_stage: OpenStage, kind: tuple[Any, ...], tmp_path: Path
) -> None:
    signed = dict.fromkeys(("task_serializer", "result_serializer", "event_serializer"), "auth")
    stage = open_stage(*kind, extras=("auth",), accept_content=["auth"], **signed, **make_key(tmp_path))
    stage.start_worker("-c", "1")
    stage.client.setup_security()
    (tmp_path / "stranger").mkdir()
    # Its certificate has the name and number of the one that is trusted, but not its key.
    files = make_key(tmp_path / "stranger")
    key = PrivateKey(Path(files["security_key"]).read_text())
    certificate = Certificate(Path(files["security_certificate"]).read_text())
    body = SecureSerializer(key, certificate).serialize([[1], {}, {}])
    error = stage.error(_raw(stage, body, content_type="application/data"))
    assert "class=signature)" in str(error)
    assert type(error).__name__ == "InvalidTaskError"
    assert "Rejected unaccepted message: class=signature" in stage.worker.log()
    assert stage.get(stage.tasks.add.delay(2, 3)) == 5


def _raw(stage: CeleryStage, body: str, content_type: str = "application/json") -> Any:
    """Send a call of ``identity`` with this body."""
    task_id = str(uuid.uuid4())
    headers = {"task": f"{TASKS}.identity", "id": task_id, "lang": "py"}
    with stage.client.producer_pool.acquire() as producer:
        stage.client.backend.on_task_call(producer, task_id)
        producer.publish(
            body,
            routing_key="celery",
            headers=headers,
            content_type=content_type,
            content_encoding="utf-8",
            correlation_id=task_id,
            reply_to=stage.client.thread_oid,
        )
    return stage.client.AsyncResult(task_id)
