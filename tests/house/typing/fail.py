"""What a type checker must refuse: each line that ends in "# error", as house/test_typing.py checks. Never imported."""

from __future__ import annotations

from typing import Any

from fastq import AsyncResult, FastQ, Task, shared_task

app = FastQ("proj")
misspelt = FastQ(brokers=1, broker=5)  # error


@app.task
def add(x: int, y: int = 0) -> int:
    return x + y


@app.task(bind=True)
def bound(self: Task[..., Any], x: int) -> str:
    return str(x)


@shared_task
def shared(text: str) -> float:
    return float(text)


class Greeter(Task[[str], str]):
    def run(self, who: str) -> str:
        return who


greeter = app.register_task(Greeter)

add.delay()  # error
add.delay("1")  # error
add.delay(1, 2, 3)  # error
add.delay(1, z=2)  # error
add("1")  # error
add(1, y="2")  # error
wrong_value: str = add.delay(1).get()  # error
wrong_result: AsyncResult[str] = add.delay(1)  # error
wrong_direct: str = add(1)  # error
add.apply_async(1)  # error
add.apply_async((1,), coutdown=5)  # error
add.apply_async((1,), countdown="5")  # error
add.apply_async((1,), queue=5)  # error
add.apply_async((1,), eta=5)  # error

bound.delay()  # error
bound.delay(bound, 1)  # error
bound.delay("1")  # error
bound_value: int = bound.delay(1).get()  # error
bound.retry(task_id="x")  # error
bound.update_state("PROGRESS")  # error

shared.delay(5)  # error
shared_value: str = shared("1")  # error
greeter.delay(5)  # error
greeter_value: int = greeter.delay("x").get()  # error


@app.task(retries=3)  # error
def unknown_option() -> None: ...


@app.task(max_retries="3")  # error
def wrong_option() -> None: ...


@app.task(bind=True)  # error
def nothing_to_bind() -> None: ...


@app.task(bind=True)  # error
def binds_something_else(self: int) -> None: ...


@app.task(base=int)  # error
def no_task_class() -> None: ...


app.send_task(5)  # error
app.send_task("name", nonsense=1)  # error
app.task("name")  # error


async def main() -> None:
    value: str = await add.delay(1).aget()  # error
    await add.adelay()  # error
    await add.adelay("1")  # error
    await add.adelay(1, z=2)  # error
    await bound.adelay(bound, 1)  # error
    await add.aapply_async((1,), coutdown=5)  # error
    await app.asend_task("name", nonsense=1)  # error
    other: AsyncResult[str] = await add.adelay(1)  # error
    add.adelay(1).get()  # error
    async for state in add.delay(1).stream(1, 2):  # error
        print(state, other)
    add.delay(1).aget(1).get()  # error
    print(value)
