"""Steps around calls: asked once for each task, called where they have a part, in a worker and in ``apply``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastq import FastQ, Ignore, Reject, Retry, Step, Task
from fastq.steps import ENDS, After, Around, Before, OnException
from fastq.steps.built_in import BUILT_IN
from tests.running.test_child import Bench
from tests.toys.toy_step import Metered, Quota


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


class Noisy(Step):
    """Writes down what it sees; raises where it is told to."""

    def __init__(self, name: str, seen: list[Any], raises: str = "") -> None:
        self.name, self.seen, self.raises = name, seen, raises

    def before(self, task: Task[..., Any]) -> Before:
        return lambda task_id, args, kwargs: self.note("before", task_id, list(args), task.request.id)

    def on_exception(self, task: Task[..., Any]) -> OnException:
        return lambda error: self.note("exception", repr(error))

    def after(self, task: Task[..., Any], state: str) -> After:
        def note(ended: str, value: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            self.note("after", ended, repr(value), task.request.id, einfo is not None)
            assert ended == state

        return note

    def note(self, what: str, *details: Any) -> None:
        self.seen.append((self.name, what, *details))
        if what == self.raises:
            raise RuntimeError(what)


def test_a_task_that_no_step_is_for_has_nothing_around_it(bench: Bench) -> None:
    task = bench.app.task(name="plain")(lambda: 1)
    around = Around(task, (Step(), Quota(), *BUILT_IN))
    assert (around.before, around.on_exception) == ((), ())
    assert around.after == dict.fromkeys(ENDS, ())


def test_the_first_step_is_the_outermost(bench: Bench) -> None:
    seen: list[Any] = []
    bench.app.steps = (Noisy("outer", seen), Noisy("inner", seen))
    bench.app.task(name="t")(lambda x: x + 1)
    [outcome] = bench.run(bench.call("t", 1))
    assert outcome.meta["result"] == 2
    assert seen == [
        ("outer", "before", "id-1", [1], "id-1"),
        ("inner", "before", "id-1", [1], "id-1"),
        ("inner", "after", "SUCCESS", "2", "id-1", False),
        ("outer", "after", "SUCCESS", "2", "id-1", False),
    ]


@pytest.mark.parametrize(
    ("raises", "state", "error"),
    [
        ("before", "FAILURE", "RuntimeError"),
        ("exception", "FAILURE", "RuntimeError"),
        ("after", "FAILURE", "ValueError"),
    ],
)
def test_what_a_step_raises_ends_the_call_unless_it_has_ended(
    bench: Bench, raises: str, state: str, error: str
) -> None:
    bench.app.steps = (Noisy("step", [], raises),)

    @bench.app.task(name="t")
    def t() -> None:
        raise ValueError

    bench.app.task(name="good")(lambda: 1)
    failed, good = bench.run(bench.call("t"), bench.call("good"))
    assert (failed.state, failed.meta["result"]["exc_type"]) == (state, error)
    assert good.state == ("FAILURE" if raises == "before" else "SUCCESS")


class Later(Step):
    """Has a call run again that has met a closed door."""

    def on_exception(self, task: Task[..., Any]) -> OnException:
        return lambda error: task.send_retry(error, 0) if isinstance(error, PermissionError) else None


@pytest.mark.parametrize(
    ("error", "state"),
    [(ValueError(), "FAILURE"), (Ignore(), "IGNORED"), (Reject("bad"), "REJECTED"), (PermissionError(), "RETRY")],
)
def test_steps_hear_of_every_end(bench: Bench, error: Exception, state: str) -> None:
    seen: list[Any] = []
    bench.app.steps = (Noisy("step", seen), Later())

    @bench.app.task(name="t")
    def t() -> None:
        raise error

    [outcome] = bench.run(bench.call("t"))
    assert outcome.state == state
    assert [each[2] for each in seen if each[1] == "after"] == [state]
    raised = next(each[2] for each in seen if each[1] == "exception")
    assert raised.startswith("Retry" if state == "RETRY" else type(error).__name__)


def test_a_step_of_the_applications_own_keeps_its_promise(bench: Bench) -> None:
    quota = Quota()
    bench.app.steps = (quota,)
    bench.app.task(name="free")(lambda: 1)

    @bench.app.task(name="closed", base=Metered)
    def closed() -> None:
        """Never run."""

    @bench.app.task(name="open", base=Metered)
    def open_() -> int:
        return quota.running["open"]

    closed.quota, open_.quota = 0, 1  # type: ignore[attr-defined]
    outcomes = bench.run(bench.call("free"), bench.call("closed"), bench.call("open"), bench.call("open"))
    assert [(each.state, each.meta["result"]) for each in outcomes[2:]] == [("SUCCESS", 1)] * 2
    assert [each.state for each in outcomes] == ["SUCCESS", "REJECTED", "SUCCESS", "SUCCESS"]
    assert quota.ended == {"REJECTED": 1, "SUCCESS": 2}
    assert sorted(quota.asked) == ["closed", "free", "open"]  # once each, however many calls


def run_in_worker(bench: Bench) -> list[str]:
    return [outcome.state for outcome in bench.run(bench.call("t", 1), bench.call("t", 0))]


def run_here(bench: Bench) -> list[str]:
    task = bench.app.tasks["t"]
    return [task.apply((number,), task_id=f"id-{number}").state for number in (1, 0)]


@pytest.mark.parametrize("run", [run_in_worker, run_here])
def test_calls_have_the_same_steps_in_a_worker_and_here(bench: Bench, run: Callable[[Bench], list[str]]) -> None:
    seen: list[Any] = []
    bench.app.steps = (Noisy("step", seen),)
    bench.app.task(name="t")(lambda x: 1 // x)
    assert run(bench) == ["SUCCESS", "FAILURE"]
    error = repr(ZeroDivisionError("integer division or modulo by zero"))
    assert [each[:3] for each in seen if each[1] != "before"] == [
        ("step", "after", "SUCCESS"),
        ("step", "exception", error),
        ("step", "after", "FAILURE"),
    ]


def test_a_step_may_have_an_eager_call_run_again(bench: Bench) -> None:
    doors = iter([PermissionError(), None])

    @bench.app.task(name="t")
    def t() -> str:
        if (error := next(doors)) is not None:
            raise error
        return "in"

    bench.app.steps = (Later(),)
    assert t.apply().get() == "in"


def test_a_class_in_place_of_a_step_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"steps holds <class '.*Quota'>; expected instances"):
        FastQ("t", broker="memory://", steps=[Quota])  # type: ignore[list-item]


def test_a_retry_is_no_failure_to_a_step_of_a_retried_task(bench: Bench) -> None:
    """The steps of fastq are the inner ones: an application's own see what those have made of a call."""
    seen: list[Any] = []
    app = FastQ("t", broker="memory://", steps=[Noisy("step", seen)])

    @app.task(name="t", autoretry_for=(KeyError,), retry_kwargs={"max_retries": 1})
    def t() -> None:
        raise KeyError("k")

    assert t.apply().state == "FAILURE"
    assert [each[1:3] for each in seen if each[1] == "after"] == [("after", "RETRY"), ("after", "FAILURE")]
    assert [each[2].partition("(")[0] for each in seen if each[1] == "exception"] == [Retry.__name__, "KeyError"]


def test_a_step_that_gives_no_function_is_named_when_it_is_asked(bench: Bench) -> None:
    class Counting(Step):
        def before(self, task: Task[..., Any]) -> Before:
            return 1  # type: ignore[return-value]

    task = bench.app.task(name="counted")(lambda: 1)
    with pytest.raises(TypeError, match=r"step \S+Counting has given 1; expected a function or None"):
        Around(task, (Counting(),))
