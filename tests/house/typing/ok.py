"""Calls that a type checker must accept; house/test_typing.py runs mypy --strict over this file. Never imported."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from typing_extensions import assert_type

from fastq import AsyncResult, EagerResult, FastQ, Progress, Retry, Task, shared_task

app = FastQ("proj", broker="memory://", backend="memory://", include=["proj.tasks"], task_default_queue="q")


@app.task
def add(x: int, y: int = 0, *, z: int = 0) -> int:
    return x + y + z


@app.task(name="options", max_retries=None, autoretry_for=(OSError,), throws=KeyError, expires=timedelta(1).seconds)
def with_options(text: str) -> list[str]:
    return [text]


@app.task(bind=True, queue="q", priority=5)
def bound(self: Task[..., Any], x: int) -> str:
    if self.request.retries < 3:
        raise self.retry(countdown=5, exc=ValueError(), queue="other")
    self.update_state(state="PROGRESS", meta={"done": x})
    return str(x)


@app.task(bind=False)
def unbound(x: int) -> None: ...


@shared_task
def shared(x: int) -> float:
    return x / 2


@shared_task(bind=True, max_retries=5)
def shared_bound(self: Task[..., Any], x: int) -> bytes:
    return bytes(x)


class Base(Task[..., Any]):
    max_retries = 9
    throws = (KeyError,)

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None: ...


@app.task(base=Base)
def based(x: int) -> int:
    return x


@app.task(base=Base, bind=True)
def based_and_bound(self: Base, x: int) -> int:
    return x


class Greeter(Task[[str], str]):
    def run(self, who: str) -> str:
        return who


greeter = app.register_task(Greeter)

assert_type(add(1, 2), int)
assert_type(add.delay(1), AsyncResult[int])
assert_type(add.delay(1, y=2, z=3).get(), int)
assert_type(add.apply_async((1, 2), {"z": 3}, countdown=5, headers={"a": 1}), AsyncResult[int])
assert_type(add.apply_async(eta=datetime.now(), expires=datetime.now(), retry=False).get(timeout=1), int)
assert_type(add.apply((1,)), EagerResult[int])
assert_type(add.apply((1,)).get(), int)
assert_type(add.AsyncResult("id").get(), int)
assert_type(with_options.delay("x").get(), list[str])
assert_type(bound(1), str)
assert_type(bound.delay(x=1).get(), str)
assert_type(bound.retry(throw=False), Retry)
assert_type(unbound.delay(1).get(), None)
assert_type(shared(1), float)
assert_type(shared.delay(1).get(), float)
assert_type(shared_bound.delay(3).get(), bytes)
assert_type(based.delay(1).get(), int)
assert_type(based_and_bound.delay(1).get(), int)
assert_type(greeter.delay("you").get(), str)
assert_type(app.send_task("by.name", [1], {"k": 2}, queue="q", priority=3).get(), Any)
assert_type(app.AsyncResult("id").get(), Any)
assert_type(add.delay(1).id, str)
assert_type(add.delay(1).ready(), bool)

with app.batch():
    add.delay(1)
with app.override(task_always_eager=True):
    add.delay(1)


async def main() -> int:
    assert_type(await add.adelay(1, y=2, z=3), AsyncResult[int])
    assert_type(await add.aapply_async((1, 2), {"z": 3}, countdown=5, headers={"a": 1}), AsyncResult[int])
    assert_type(await (await bound.adelay(x=1)).aget(), str)
    assert_type(await (await shared.adelay(1)).aget(), float)
    assert_type(await greeter.adelay("you"), AsyncResult[str])
    assert_type(await (await app.asend_task("by.name", [1], {"k": 2}, queue="q")).aget(), Any)
    async for progress in add.delay(1).stream(timeout=5):
        assert_type(progress, Progress)
        assert_type(progress.state, str)
    async with app.abatch():
        await add.adelay(1)
    await app.aclose()
    return await add.delay(1).aget(timeout=5)
