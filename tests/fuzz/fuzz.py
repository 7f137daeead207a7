"""The message fuzz: random messages and commands to running workers, none of which may end, stall or grow by it.

    python -m tests.fuzz [minutes] [--seed N] [--batch N] [--target amqp-fastq]

Messages of both protocols, their properties and headers, Redis envelopes and remote control are made by mutating good
ones and those in ``tests/corpus``. After each batch a good call and a command must be answered in time, by the same
processes, within a bound of memory. What a batch holds follows from the seed and its number alone: the line printed at
a failure sends it again. What once failed is kept in the corpus.
"""

from __future__ import annotations

import argparse
import base64
import bz2
import contextlib
import json
import lzma
import random
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgpack
import yaml

from fastq.brokers.redis.bus import BlockingRedisBus
from fastq.errors import FastqError
from fastq.wire.head import scan
from fastq.wire.kombu import encode_envelope
from fastq.wire.message import Message, encode_properties
from fastq.wire.properties import decode_properties
from tests.support.attacked_worker import MIB, NODE, Attacked, Program, memory_of
from tests.support.malformed_messages import headers
from tests.support.servers import RabbitMQ, Redis
from tests.support.stage import QUEUE, Kind, Stage, empty_database

CORPUS = Path(__file__).parent / "corpus"
TARGETS: tuple[tuple[Kind, Program], ...] = (
    ("amqp", "fastq"), ("amqp", "celery"), ("redis", "fastq"), ("redis", "celery"),
)  # fmt: skip
BATCH = 200
#: A good call behind a batch, on a loaded machine.
ANSWER_S = 60.0
#: Of any process of the worker, at any moment, beyond what it had at first. A message here has less than 1 MB.
GROWTH_MIB = 200
PIDBOX = "celery.pidbox"

What = Literal["message", "envelope", "command"]


class FuzzFailed(AssertionError):
    """A worker did not do as it must; the text says how to send the same again."""


@dataclass(frozen=True)
class Attack:
    """One thing that is sent. ``envelope``: the body is what stands in Redis."""

    what: What
    props: bytes
    body: bytes

    def to_json(self) -> str:
        """Return it as a file of the corpus."""
        parts = {"props": base64.b64encode(self.props).decode(), "body": base64.b64encode(self.body).decode()}
        return json.dumps({"what": self.what, **parts}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Attack:
        """Return what a file of the corpus holds."""
        found = json.loads(text)
        return Attack(found["what"], base64.b64decode(found["props"]), base64.b64decode(found["body"]))


def corpus() -> list[Attack]:
    """Return what is kept."""
    return [Attack.from_json(path.read_text(encoding="utf-8")) for path in sorted(CORPUS.glob("*.json"))]


# --- making them ------------------------------------------------------------------------------------------------------

CONTENT_TYPES = [
    *["application/json"] * 6, "application/x-yaml", "application/x-msgpack", "application/x-python-serialize",
    "application/data", "application/text", "text/plain", "", "application/json; charset=utf-8", "x" * 255,
]  # fmt: skip
ENCODINGS = [
    *["utf-8"] * 6, "binary", "us-ascii", "latin-1", "utf-16", "UTF-32", "punycode", "idna", "utf-7", "zlib", "rot13",
    "unicode_escape", "\0", "", "base64", "x" * 255, "ascii-8bit", "undefined",
]  # fmt: skip
COMPRESSIONS = [
    "application/x-gzip", "gzip", "application/x-bz2", "application/x-lzma", "application/zstd", "application/x-brotli",
    "zip", "", 7, None, ["gzip"], "\0",
]  # fmt: skip
#: What may do harm by what it is for is not among them.
COMMANDS = [
    "ping", "clock", "report", "conf", "hello", "stats", "active", "reserved", "scheduled", "query_task", "revoked",
    "revoke", "terminate", "revoke_by_stamped_headers", "registered", "rate_limit", "time_limit", "active_queues",
    "enable_events", "disable_events", "heartbeat", "election", "memsample", "memdump", "pool_restart", "autoscale",
    "dump_tasks", "no_such_command", "",
]  # fmt: skip
NAMES = [
    "nobody.knows",
    "celery.chord_unlock",
    "celery.map",
    "celery.group",
    "celery.chain",
    "celery.accumulate",
    "w\0rk",
]
PATTERNS = [
    "*",
    "a*",
    "(|)" * 40 + "!",
    "(a*)*b",
    ".*.*.*.*!",
    "[",
    "(?=.)",
    r"(.)\1",
    "a{9999}",
    "*a" * 99,
    "\0",
    "(" * 99,
]
MOMENTS = [
    "2999-01-01T00:00:00+00:00", "1970-01-01", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999Z", "tomorrow",
    "2026-W01", "-1", 0, 1e18, -1e18, 5.5,
]  # fmt: skip
KEYS = [
    "task", "id", "eta", "expires", "retries", "timelimit", "argsrepr", "kwargsrepr", "stamps", "stamped_headers",
    "group", "group_index", "root_id", "parent_id", "shadow", "origin", "ignore_result", "replaced_task_nesting",
    "compression", "clock", "x-death", "x-delivery-count", "redelivered", "callbacks", "errbacks", "chain", "chord",
    "args", "kwargs", "taskset", "utc", "", "\0", "__type__", "__value__", "self", "view", "x" * 200,
]  # fmt: skip
#: Of the body of protocol 1.
OLD_FIELDS = ["callbacks", "errbacks", "chord", "taskset", "timelimit", "eta", "expires", "group"]
#: Of commands.
ARGUMENTS = [
    "task_id", "ids", "headers", "task_name", "rate_limit", "hard", "soft", "signal", "terminate", "from_node",
    "revoked", "safe", "samples", "taskinfoitems", "with_defaults", "n", "max", "min", "id", "topic", "view", "self",
]  # fmt: skip


class Generator:
    """Makes the batch of that number under that seed, always the same one."""

    def __init__(self, seed: int, batch: int, seeds: Sequence[Attack]) -> None:
        self._random = random.Random(f"{seed}-{batch}")
        self._seeds = seeds

    def attacks(self, count: int, kind: Kind) -> list[Attack]:
        """Return so many for that broker."""
        made = [self._message, self._message, self._protocol_1, self._command, self._kept]
        made += [self._envelope] * 2 if kind == "redis" else []
        return [self._one(self._random.choice(made)) for _ in range(count)]

    def _one(self, make: Callable[[], Attack]) -> Attack:
        while True:
            # What a mutation has made without a form is made anew.
            with contextlib.suppress(Exception):
                return make()

    # --- values

    def odd(self, depth: int = 0) -> Any:
        """Return a value that is rarely meant."""
        pick = self._random
        kind = pick.randrange(16)
        if kind < 5:
            return pick.choice(
                [None, True, False, 0, -1, 10**6, 2**31, 2**63 - 1, -(2**63), 1e308, -0.0, "", "\0", [], {}]
            )
        if kind == 5:
            return pick.choice([2**64, 10**400, float("nan"), float("inf"), "caf\udce9", "\u202e\ud800", "x" * 70_000])
        if kind == 6:
            return pick.choice(MOMENTS)
        if kind == 7:
            return "".join(
                chr(pick.choice([pick.randrange(128), pick.randrange(0xD000)])) for _ in range(pick.randrange(40))
            )
        if kind == 8:
            value: Any = pick.choice([[], {}, 7])
            for _ in range(pick.choice([3, 31, 33, 120, 250, 600])):
                value = [value] if pick.random() < 0.7 else {"k": value}
            return value
        if kind == 9:
            return [pick.choice([[], {}, 0, "x"]) for _ in range(pick.choice([3, 100, 5000]))]
        if kind == 10:
            return {
                "__type__": pick.choice(["datetime", "uuid", "decimal", "bytes", "base64", "x", 7]),
                "__value__": self.odd(9),
            }
        if kind == 11:
            return pick.choice([*NAMES, "work", new_id_of(pick)])
        if kind == 12:
            return self.signature()
        if depth > 2:
            return 7
        if kind == 13:
            return {pick.choice(KEYS): self.odd(depth + 1) for _ in range(pick.randrange(6))}
        return [self.odd(depth + 1) for _ in range(pick.randrange(6))]

    def signature(self) -> dict[str, Any]:
        """Return a call as Celery writes what follows another one."""
        name = self._random.choice([*NAMES, "work"])
        made = {"task": name, "args": [10**6], "kwargs": {}, "options": {}, "subtask_type": None, "immutable": True}
        return self.mutated(made, self._random.randrange(3))

    def mutated(self, value: Any, times: int) -> Any:
        """Return a deep copy with so many places changed."""
        value = json.loads(json.dumps(value))
        for _ in range(times):
            owner = self._place_in(value)
            if owner is None:
                return self.odd()
            if isinstance(owner, dict):
                key = self._random.choice([*owner, self._random.choice(KEYS)])
                if self._random.random() < 0.2:
                    owner.pop(key, None)
                else:
                    owner[key] = self.odd()
            elif owner and self._random.random() < 0.8:
                owner[self._random.randrange(len(owner))] = self.odd()
            else:
                owner.append(self.odd())
        return value

    def _place_in(self, value: Any) -> Any:
        places = [value] if isinstance(value, (dict, list)) else []
        for place in places:
            inner = place.values() if isinstance(place, dict) else place
            places.extend(each for each in inner if isinstance(each, (dict, list)))
            if len(places) > 50:
                break
        return self._random.choice(places) if places else None

    def damaged(self, data: bytes) -> bytes:
        """Return bytes of which a few were changed, dropped or repeated."""
        changed = bytearray(data)
        for _ in range(self._random.randrange(1, 5)):
            at = self._random.randrange(len(changed) + 1)
            how = self._random.randrange(4)
            if how == 0 and at < len(changed):
                changed[at] = self._random.randrange(256)
            elif how == 1:
                del changed[at : at + self._random.randrange(1, 20)]
            elif how == 2:
                changed[at:at] = changed[at : at + 30] * self._random.randrange(1, 5)
            else:
                changed[at:at] = self._random.randbytes(self._random.randrange(1, 9))
        return bytes(changed)

    # --- messages

    def _message(self) -> Attack:
        task_id = new_id_of(self._random)
        table = headers(id=task_id, root_id=task_id, argsrepr="()", ignore_result=self._random.random() < 0.8)
        if self._random.random() < 0.7:
            table = self.mutated(table, self._random.randrange(1, 4))
        body = [[10**6, self.odd() if self._random.random() < 0.3 else 0], {}, {}]
        if self._random.random() < 0.3:
            body[2] = {self._random.choice(["callbacks", "errbacks", "chain"]): [self.signature(), self.signature()]}
        if self._random.random() < 0.5:
            body = self.mutated(body, self._random.randrange(1, 3))
        return self._sent(table, body)

    def _protocol_1(self) -> Attack:
        body: dict[str, Any] = dict.fromkeys(OLD_FIELDS)
        body.update(task="work", id=new_id_of(self._random), args=[10**6], kwargs={}, retries=0, utc=True)
        table = self.mutated({}, self._random.randrange(3))
        return self._sent(table if isinstance(table, dict) else {}, self.mutated(body, self._random.randrange(3)))

    def _sent(self, table: Any, value: Any) -> Attack:
        content_type = self._random.choice(CONTENT_TYPES)
        body = self._encoded(value, content_type)
        if self._random.random() < 0.15:
            table["compression"] = self._random.choice(COMPRESSIONS)
            body = self._random.choice([zlib.compress, bz2.compress, lzma.compress, bytes])(body)
        if self._random.random() < 0.15:
            body = self.damaged(body)
        return Attack("message", self._properties(table, content_type), body)

    def _encoded(self, value: Any, content_type: str) -> bytes:
        if content_type == "application/x-yaml":
            return str(yaml.dump(value, Dumper=yaml.CSafeDumper)).encode("utf-8", "replace")
        if content_type == "application/x-msgpack":
            packed: bytes = msgpack.packb(value)
            return packed
        return json.dumps(value, ensure_ascii=self._random.random() < 0.5).encode("utf-8", "surrogatepass")

    def _properties(self, table: Any, content_type: str) -> bytes:
        found: dict[str, Any] = {
            "content_type": content_type,
            "content_encoding": "utf-8",
            "headers": table,
            "delivery_mode": 1,
        }
        if self._random.random() < 0.3:
            found["content_encoding"] = self._random.choice(ENCODINGS)
        if self._random.random() < 0.3:
            name = self._random.choice(["correlation_id", "reply_to", "expiration", "message_id", "type", "app_id"])
            found[name] = self._random.choice(["", "x" * 255, "\0", "no.such.queue", "100", "-1", "ü" * 100])
        if self._random.random() < 0.2:
            found["priority"] = self._random.choice([0, 3, 9, 255])
        props = encode_properties({name: each for name, each in found.items() if each != ""})
        return self.damaged(props) if self._random.random() < 0.1 else props

    def _kept(self) -> Attack:
        seed = self._random.choice(self._seeds)
        props = self.damaged(seed.props) if self._random.random() < 0.3 else seed.props
        return Attack(seed.what, props, self.damaged(seed.body) if self._random.random() < 0.7 else seed.body)

    def _envelope(self) -> Attack:
        message = self._random.choice([self._message, self._protocol_1])()
        envelope = json.loads(encode_envelope("", QUEUE, message.props, message.body, new_id_of(self._random)))
        if self._random.random() < 0.3:
            envelope["body"] = message.body.decode("utf-8", "surrogatepass")
            envelope["properties"]["body_encoding"] = self._random.choice(["utf-8", None, "base64", "x", 7])
        text = json.dumps(self.mutated(envelope, self._random.randrange(4))).encode()
        return Attack("envelope", b"", self.damaged(text) if self._random.random() < 0.3 else text)

    # --- commands

    def _command(self) -> Attack:
        pick = self._random
        request = {
            "method": pick.choice(COMMANDS),
            "arguments": {pick.choice(ARGUMENTS): self.odd() for _ in range(pick.randrange(4))},
            "destination": pick.choice([None, None, [NODE], ["x"] * 3]),
            "pattern": pick.choice([None, None, *PATTERNS]),
            "matcher": pick.choice([None, "glob", "pcre", "x"]),
            "ticket": new_id_of(pick),
            "reply_to": pick.choice([None, {"exchange": "reply.celery.pidbox", "routing_key": new_id_of(pick)}]),
        }
        if pick.random() < 0.5:
            request = self.mutated(request, pick.randrange(1, 3))
        if isinstance(request, dict) and request.get("arguments") and "work" in json.dumps(request["arguments"]):
            request["arguments"] = {}  # limits of the task that good calls are of
        content_type = pick.choice(CONTENT_TYPES)
        body = self._encoded(request, content_type)
        props = self._properties({"clock": self.odd(), "expires": time_of(pick)}, content_type)
        return Attack("command", props, self.damaged(body) if pick.random() < 0.15 else body)


def new_id_of(generator: random.Random) -> str:
    """Return an id that follows from the seed."""
    return f"fuzz-{generator.getrandbits(64):016x}"


def time_of(generator: random.Random) -> Any:
    """Return what may stand for the moment at which a request is too old."""
    return generator.choice([None, 2e9, 0, "x", -1])


# --- sending them -----------------------------------------------------------------------------------------------------


class Target:
    """A worker, and what it had before the first batch."""

    def __init__(self, stage: Stage, program: Program) -> None:
        self.name = f"{stage.kind}-{program}"
        self.stage = stage
        # So that no number of an attack is that of a good call.
        stage.sent += range(1000, 1010)
        self.attacked = Attacked(stage, program, children=2, accept_content=["json", "yaml", "msgpack"])
        self.attacked.send_good(ANSWER_S, 50)
        self._memory = {pid: memory_of(pid, "VmRSS") for pid in self.attacked.worker.tree()}
        for pid in self._memory:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): resets the peak
        self.sent = 0

    def close(self) -> None:
        """Close the test's connections and end the worker."""
        self.attacked.close()
        self.stage.close()

    def _is_carried(self, attack: Attack) -> bool:
        """Whether a client could send it: RabbitMQ ends a connection over properties that are none.

        And, without anybody's doing, a queue with dead letters over such deaths as it cannot add to, once they expire.
        """
        if attack.what == "envelope":
            return self.stage.redis is not None
        try:
            found = decode_properties(attack.props)
            if self.stage.rabbitmq is not None and "expiration" in found and scan(attack.props)["breaks_dead_letters"]:
                return False
            if self.stage.redis is not None:
                encode_envelope("", QUEUE, attack.props, b"", "")
        except FastqError:
            return False
        return True

    def run(self, attacks: Sequence[Attack], again: str) -> None:
        """Send a batch and look whether all is as it must be. Raises FuzzFailed."""
        carried = [attack for attack in attacks if self._is_carried(attack)]
        if self.stage.redis is not None:
            self.stage.redis.pipeline([self._command_for(attack) for attack in carried])
        else:
            self._publish([self._message_for(attack) for attack in carried])
        self.sent += len(carried)
        try:
            self._check()
        except Exception as error:
            log = self.attacked.worker.log()[-5000:]
            raise FuzzFailed(f"{self.name}: {type(error).__name__}: {error}\n{log}\nagain: {again}") from error

    def _command_for(self, attack: Attack) -> tuple[Any, ...]:
        """Return what puts it into Redis."""
        if attack.what == "command":
            bus = self.attacked.bus
            assert isinstance(bus, BlockingRedisBus)
            channel = bus._layout.channel(PIDBOX, "")
            return "PUBLISH", channel, encode_envelope(PIDBOX, "", attack.props, attack.body, "tag")
        is_whole = attack.what == "envelope"
        return "LPUSH", QUEUE, attack.body if is_whole else encode_envelope("", QUEUE, attack.props, attack.body, "tag")

    def _message_for(self, attack: Attack) -> Message:
        exchange, key = (PIDBOX, "") if attack.what == "command" else ("", QUEUE)
        return Message(exchange, key, attack.props, attack.body)

    def _publish(self, messages: Sequence[Message]) -> None:
        """Publish all; where the broker ends the connection over one of them, each by itself."""
        try:
            self.stage.publish(list(messages))
        except FastqError:
            for message in messages:
                with contextlib.suppress(FastqError):
                    self.stage.publish([message])

    def _check(self) -> None:
        self.attacked.send_good(ANSWER_S, 5)
        assert self.attacked.ask("ping", ANSWER_S) == {"ok": "pong"}
        for method in ("scheduled", "reserved", "active"):
            rows = self.attacked.ask(method, ANSWER_S)
            assert isinstance(rows, list), (method, rows)
        assert self.attacked.worker.exit_code is None
        self.attacked.check_alive()
        growth = {pid: (memory_of(pid, "VmHWM") - had) / MIB for pid, had in self._memory.items()}
        assert max(growth.values()) < GROWTH_MIB, f"memory grew by {growth} MiB"

    @property
    def growth(self) -> str:
        """What each process has taken at most beyond what it had."""
        growth = [(memory_of(pid, "VmHWM") - had) / MIB for pid, had in self._memory.items()]
        return "+" + " +".join(f"{each:.0f}" for each in growth) + " MiB"


def fuzz(targets: Sequence[Target], seed: int, seconds: float, only: int | None = None) -> int:
    """Send what is kept, then batches to each target in turn until the time is up; return how many things were sent."""
    kept = corpus()
    ends_at = time.monotonic() + seconds
    batch = 0 if only is None else only
    if only is None:
        for target in targets:
            target.run(kept, f"./ci/fuzz 0 --target {target.name}")
    while time.monotonic() < ends_at or only is not None:
        for target in targets:
            attacks = Generator(seed, batch, kept).attacks(BATCH, target.stage.kind)
            target.run(attacks, f"./ci/fuzz --seed {seed} --batch {batch} --target {target.name}")
        if only is not None:
            break
        batch += 1
        print(f"{batch} batches", " ".join(f"{target.name} {target.growth}" for target in targets), flush=True)
    return sum(target.sent for target in targets)


@contextlib.contextmanager
def opened(kinds: Sequence[tuple[Kind, Program]], folder: Path) -> Iterator[list[Target]]:
    """Private servers, and a worker for each kind on them."""
    with contextlib.ExitStack() as closing:
        targets = []
        servers: dict[str, Any] = {}
        for kind, program in kinds:
            (place := folder / f"{kind}-{program}").mkdir()
            if kind not in servers:
                (own := folder / kind).mkdir()
                server = servers[kind] = RabbitMQ(own) if kind == "amqp" else Redis(own)
                server.start()
                closing.callback(server.close)
            server = servers[kind]
            if isinstance(server, RabbitMQ):
                stage = Stage(kind, server.url(server.new_vhost()), place, server)
            else:
                stage = Stage(kind, empty_database(server), place)
            target = Target(stage, program)
            closing.callback(target.close)
            targets.append(target)
        yield targets


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="ci/fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("minutes", type=float, nargs="?", default=2.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--batch", type=int, help="that one alone")
    parser.add_argument("--target", choices=["-".join(each) for each in TARGETS], help="that one alone")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    kinds = [each for each in TARGETS if options.target in (None, "-".join(each))]
    with tempfile.TemporaryDirectory() as folder, opened(kinds, Path(folder)) as targets:
        try:
            sent = fuzz(targets, options.seed, options.minutes * 60, options.batch)
        except FuzzFailed as error:
            print(error)
            return 1
        for target in targets:
            print(f"{target.name}: {target.sent} sent, memory {target.growth}")
    print(f"{sent} messages and commands, none of which ended, stalled or bloated a worker")
    return 0
