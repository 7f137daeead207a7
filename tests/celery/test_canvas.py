"""Workflows: chains, groups, chords, callbacks, errbacks, replacing, stamps, maps. Sent by Celery, run by each worker.

On Redis a chord counts its header; on a database it is polled for by `celery.chord_unlock`; rpc:// has no chords.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Signature, chain, chord, group
from celery.canvas import StampingVisitor
from celery.exceptions import ChordError
from celery.result import GroupResult

from tests.celery.conftest import stages
from tests.celery.proj.errors import PlainError
from tests.celery.stage import CeleryStage, Servers, opened

CANVAS = "tests.celery.proj.canvas"


@pytest.fixture(scope="module", params=stages(("amqp", "database"), ("redis", "redis")))
def stage(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryStage]:
    settings = {"result_chord_retry_interval": 0.2}
    with opened(servers, tmp_path_factory, *request.param, **settings) as stage:
        stage.start_worker()
        yield stage


@pytest.fixture(scope="module", params=stages(("amqp", "redis"), ("redis", "redis"), runners=("fastq",)))
def telling_stage(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryStage]:
    """Celery's workers leave out who waits for a message that they cannot run: the chord never ends."""
    with opened(servers, tmp_path_factory, *request.param) as stage:
        stage.start_worker()
        yield stage


@pytest.fixture(scope="module", params=stages(("amqp", "rpc")))
def rpc_stage(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryStage]:
    with opened(servers, tmp_path_factory, *request.param) as stage:
        stage.start_worker()
        yield stage


def get(stage: CeleryStage, signature: Signature, **options: Any) -> Any:
    """Run the workflow and return its value."""
    return stage.get(signature.apply_async(**options))


# --- chains -----------------------------------------------------------------------------------------------------------


def test_a_chain_passes_each_value_on(stage: CeleryStage) -> None:
    t = stage.tasks
    result = chain(t.add.s(1, 2), t.add.s(4), t.double.s())()
    assert stage.get(result) == 14
    assert stage.get(result.parent) == 7
    assert stage.get(result.parent.parent) == 3
    assert result.parent.parent.parent is None


def test_a_chain_is_written_with_bars(stage: CeleryStage) -> None:
    t = stage.tasks
    assert get(stage, t.add.s(1, 2) | t.double.s() | t.add.s(1)) == 7


def test_an_immutable_step_ignores_the_value_before(stage: CeleryStage) -> None:
    t = stage.tasks
    assert get(stage, chain(t.add.s(1, 2), t.add.si(10, 10), t.double.s())) == 40


def test_arguments_of_the_call_go_to_the_first_step(stage: CeleryStage) -> None:
    t = stage.tasks
    assert get(stage, chain(t.add.s(1), t.double.s()), args=(5,)) == 12


def test_the_steps_of_a_chain_know_their_parent_and_root(stage: CeleryStage) -> None:
    t = stage.tasks
    result = chain(t.where.s(), t.where.s(), t.where.s())()
    last = stage.get(result)
    (second,) = last["args"]
    (first,) = second["args"]
    assert (first["parent_id"], second["parent_id"], last["parent_id"]) == (None, first["id"], second["id"])
    assert {first["root_id"], second["root_id"], last["root_id"]} == {first["id"]}
    assert [step["chain"] for step in (first, second, last)] == [2, 1, 0]
    assert last["id"] == result.id


def test_a_failed_step_ends_the_chain(stage: CeleryStage) -> None:
    t = stage.tasks
    label = "after the failure"
    result = chain(t.add.s(1, 1), t.fail_here.s(), t.keep.s(label))()
    assert type(stage.error(result.parent)) is PlainError
    assert stage.get(t.add.delay(1, 1)) == 2
    assert stage.notes("kept", label=label) == []
    # Waiting for the end of a chain raises what any of its steps raised.
    with pytest.raises(PlainError, match="here"):
        result.get(timeout=10)
    # Celery's code stores the state of the steps behind it after its own.
    stage.until(lambda: result.state == "FAILURE", "the state of the last step")


def test_a_retried_step_keeps_its_chain(stage: CeleryStage) -> None:
    t = stage.tasks
    assert get(stage, chain(t.add.s(1, 2), t.retry_once.s(), t.double.s())) == 6


def test_a_long_chain(stage: CeleryStage) -> None:
    t = stage.tasks
    assert get(stage, chain(t.add.s(0, 1), *[t.add.s(1) for _ in range(29)])) == 30


def test_a_chain_of_one_and_of_none(stage: CeleryStage) -> None:
    t = stage.tasks
    assert get(stage, chain(t.add.s(1, 2))) == 3
    assert chain()() is None


def test_a_step_waits_for_its_countdown(stage: CeleryStage) -> None:
    t = stage.tasks
    result = chain(t.note_time.si("first"), t.note_time.si("second").set(countdown=1))()
    second = stage.get(result)
    assert 1.0 <= second - stage.get(result.parent) < 5.0


# --- callbacks and errbacks -------------------------------------------------------------------------------------------


def test_a_callback_gets_the_value(stage: CeleryStage) -> None:
    t = stage.tasks
    result = t.add.apply_async((1, 2), link=t.keep.s("one callback"))
    assert stage.get(result) == 3
    (note,) = stage.wait_for_notes("kept", label="one callback")
    assert (note["value"], note["parent"], note["root"]) == (3, result.id, result.id)


def test_several_callbacks_run_beside_each_other(stage: CeleryStage) -> None:
    t = stage.tasks
    links = [t.keep.s("several"), t.keep.s("several"), t.keep.si(9, "immutable")]
    result = t.add.apply_async((1, 2), link=links)
    assert stage.get(result) == 3
    assert [note["value"] for note in stage.wait_for_notes("kept", 2, label="several")] == [3, 3]
    assert stage.wait_for_notes("kept", label="immutable")[0]["value"] == 9


def test_a_callback_may_be_a_workflow(stage: CeleryStage) -> None:
    t = stage.tasks
    t.add.apply_async((1, 2), link=chain(t.double.s(), t.keep.s("linked chain")))
    t.add.apply_async((1, 2), link=group(t.keep.s("linked group"), t.keep.s("linked group")))
    assert stage.wait_for_notes("kept", label="linked chain")[0]["value"] == 6
    assert [note["value"] for note in stage.wait_for_notes("kept", 2, label="linked group")] == [3, 3]


def test_a_callback_of_a_failed_call_does_not_run(stage: CeleryStage) -> None:
    t = stage.tasks
    stage.error(t.fail_here.apply_async(link=t.keep.s("never")))
    assert stage.get(t.add.delay(1, 1)) == 2
    assert stage.notes("kept", label="never") == []


def test_children_are_known_by_the_parents_result(stage: CeleryStage) -> None:
    t = stage.tasks
    result = t.add.apply_async((1, 2), link=t.double.s())
    assert stage.get(result) == 3
    (child,) = result.children
    assert stage.get(child) == 6
    assert [(node.id, value) for node, value in result.collect()] == [(result.id, 3), (child.id, 6)]


def test_an_errback_of_the_new_form_runs_where_the_task_failed(stage: CeleryStage) -> None:
    t = stage.tasks
    result = t.fail_here.apply_async(link_error=t.error_in_place.s())
    stage.error(result)
    (note,) = stage.wait_for_notes("error_in_place", failed=result.id)
    assert (note["role"], note["error"], note["traceback"]) == ("child", "PlainError('here')", True)


def test_an_errback_of_the_old_form_is_sent_the_id(stage: CeleryStage) -> None:
    t = stage.tasks
    result = t.fail_here.apply_async(link_error=t.error_by_id.s())
    stage.error(result)
    (note,) = stage.wait_for_notes("error_by_id", failed=result.id)
    assert note["role"] == "child"


def test_several_errbacks_run_once_each(stage: CeleryStage) -> None:
    t = stage.tasks
    links = [t.error_by_id.s(), t.error_in_place.s(), t.error_by_id.s()]
    result = t.fail_here.apply_async(link_error=links)
    stage.error(result)
    stage.wait_for_notes("error_by_id", 2, failed=result.id)
    stage.wait_for_notes("error_in_place", failed=result.id)
    stage.wait_for_empty()
    assert len(stage.notes("error_by_id", failed=result.id)) == 2
    assert len(stage.notes("error_in_place", failed=result.id)) == 1


def test_an_errback_of_a_chain_hears_of_any_step(stage: CeleryStage) -> None:
    t = stage.tasks
    workflow = chain(t.add.s(1, 1), t.fail_here.s(), t.keep.s("never"))
    workflow.link_error(t.error_by_id.s())
    result = workflow()
    stage.error(result.parent)
    stage.wait_for_notes("error_by_id", failed=result.parent.id)
    stage.wait_for_empty()
    assert len(stage.notes("error_by_id", failed=result.parent.id)) == 1


def test_an_errback_runs_after_the_last_retry_alone(stage: CeleryStage) -> None:
    t = stage.tasks
    # Without a countdown the last run may overtake what the one before it writes into stock Celery's database.
    result = t.retry_until.apply_async((99,), {"countdown": 0.3}, link_error=t.error_by_id.s())
    stage.error(result)
    stage.wait_for_notes("error_by_id", failed=result.id)
    stage.wait_for_empty()
    assert len(stage.notes("error_by_id", failed=result.id)) == 1


# --- groups -----------------------------------------------------------------------------------------------------------


def test_a_group_returns_its_values_in_order(stage: CeleryStage) -> None:
    t = stage.tasks
    result = group(t.add.s(number, number) for number in range(20))()
    assert isinstance(result, GroupResult)
    assert stage.get(result) == [2 * number for number in range(20)]
    assert result.completed_count() == 20
    assert result.successful()


def test_the_tasks_of_a_group_know_their_group(stage: CeleryStage) -> None:
    t = stage.tasks
    result = group(t.where.s(number) for number in range(3))()
    places = stage.get(result)
    assert [place["group_index"] for place in places] == [0, 1, 2]
    assert {place["group"] for place in places} == {result.id}


def test_groups_in_groups_and_chains_in_groups(stage: CeleryStage) -> None:
    t = stage.tasks
    inner = group(t.add.s(1, 1), t.add.s(2, 2))
    workflow = group(inner, chain(t.add.s(3, 3), t.double.s()), t.add.s(5, 5))
    assert stage.get(workflow()) == [2, 4, 12, 10]


def test_a_failed_task_of_a_group_fails_the_group(stage: CeleryStage) -> None:
    t = stage.tasks
    result = group(t.add.s(1, 1), t.fail_here.s(), t.add.s(2, 2))()
    with pytest.raises(PlainError):
        stage.get(result)
    values = stage.get(result, propagate=False)
    assert (values[0], type(values[1]), values[2]) == (2, PlainError, 4)
    assert result.failed()


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery's call of redis-py
@pytest.mark.since("5.7", "who restores a group is not told of its results")
def test_a_group_is_saved_and_restored(stage: CeleryStage) -> None:
    t = stage.tasks
    result = group(t.add.s(1, 1), t.add.s(2, 2))()
    result.save()
    restored = GroupResult.restore(result.id, app=stage.client)
    assert stage.get(restored) == [2, 4]
    restored.delete()
    assert GroupResult.restore(result.id, app=stage.client) is None


def test_an_empty_group(stage: CeleryStage) -> None:
    assert group([], app=stage.client)().get(timeout=1) == []


def test_errbacks_of_a_group_hear_of_each_failure(stage: CeleryStage) -> None:
    t = stage.tasks
    workflow = group(t.fail_here.s(1), t.add.s(1, 1), t.fail_here.s(2))
    workflow.link_error(t.error_by_id.s())
    result = workflow()
    stage.get(result, propagate=False)
    for failed in (result.results[0], result.results[2]):
        stage.wait_for_notes("error_by_id", failed=failed.id)
    assert stage.notes("error_by_id", failed=result.results[1].id) == []


def test_skew_spreads_a_group(stage: CeleryStage) -> None:
    t = stage.tasks
    began, first, second = stage.get(
        group(t.note_time.s(), *group(t.note_time.s(), t.note_time.s()).skew(start=0.6, stop=1.3, step=0.6).tasks)()
    )
    assert first - began >= 0.5
    assert second - began >= 1.0


# --- chords -----------------------------------------------------------------------------------------------------------


def test_a_chord_gives_all_values_to_its_body(stage: CeleryStage) -> None:
    t = stage.tasks
    result = chord([t.add.s(number, number) for number in range(10)])(t.total.s())
    assert stage.get(result) == 90
    assert stage.get(result.parent) == [2 * number for number in range(10)]


def test_the_values_of_a_chord_keep_their_order(stage: CeleryStage) -> None:
    t = stage.tasks
    header = [chain(t.sleep_for.si(0.3), t.identity.si("slow")), t.identity.s("fast"), t.identity.s("faster")]
    assert get(stage, chord(header, t.identity.s())) == ["slow", "fast", "faster"]


def test_a_group_before_a_task_becomes_a_chord(stage: CeleryStage) -> None:
    t = stage.tasks
    assert get(stage, group(t.add.s(1, 1), t.add.s(2, 2)) | t.total.s()) == 6
    assert get(stage, t.add.s(1, 1) | group(t.add.s(1), t.add.s(2)) | t.total.s() | t.double.s()) == 14


def test_a_chord_of_many(stage: CeleryStage) -> None:
    t = stage.tasks
    assert get(stage, chord([t.add.s(number, 0) for number in range(100)], t.total.s())) == 4950


def test_a_chord_of_one_and_of_none(stage: CeleryStage) -> None:
    t = stage.tasks
    assert get(stage, chord([t.add.s(1, 1)], t.identity.s())) == [2]
    assert get(stage, chord([], t.identity.s(), app=stage.client)) == []


def test_chords_in_chords(stage: CeleryStage) -> None:
    t = stage.tasks
    inner = chord([t.add.s(1, 1), t.add.s(2, 2)], t.total.s())
    assert get(stage, chord([inner, t.add.s(10, 0)], t.total.s())) == 16


def test_a_chord_in_the_middle_of_a_chain(stage: CeleryStage) -> None:
    t = stage.tasks
    workflow = chain(t.add.s(1, 1), chord([t.add.s(1), t.add.s(2)], t.total.s()), t.double.s())
    assert get(stage, workflow) == 14


def test_a_chord_whose_body_is_a_workflow(stage: CeleryStage) -> None:
    t = stage.tasks
    header = [t.add.s(1, 1), t.add.s(2, 2)]
    assert get(stage, chord(header, chain(t.total.s(), t.double.s()))) == 12
    assert get(stage, chord(header, group(t.total.s(), t.identity.s()))) == [6, [2, 4]]


def test_groups_after_groups(stage: CeleryStage) -> None:
    t = stage.tasks
    workflow = group(t.add.s(1, 1), t.add.s(2, 2)) | group(t.total.s(), t.identity.s()) | t.identity.s()
    assert get(stage, workflow) == [6, [2, 4]]


def test_a_retried_header_task_counts_once(stage: CeleryStage) -> None:
    t = stage.tasks
    assert get(stage, chord([t.retry_once.s(1), t.retry_once.s(2), t.add.s(3, 0)], t.total.s())) == 6


def test_a_failed_header_fails_the_body(stage: CeleryStage) -> None:
    t = stage.tasks
    body = t.total.s()
    body.link_error(t.error_by_id.s())
    result = chord([t.add.s(1, 1), t.fail_here.s(), t.add.s(2, 2)])(body)
    error = stage.error(result)
    assert type(error) is ChordError
    failed = result.parent.results[1].id
    dependency = f"Dependency {failed} raised " if stage.backend == "redis" else ""
    assert str(error) == f"{dependency}PlainError('here')"
    stage.wait_for_notes("error_by_id", failed=result.id)
    stage.wait_for_empty()
    assert len(stage.notes("error_by_id", failed=result.id)) == 1


def test_a_failed_header_fails_what_follows_the_body(stage: CeleryStage) -> None:
    t = stage.tasks
    label = "behind a failed chord"
    result = chain(chord([t.fail_here.s(), t.add.s(1, 1)], t.total.s()), t.keep.s(label))()
    with pytest.raises((ChordError, PlainError)):
        stage.get(result)
    assert stage.notes("kept", label=label) == []


def unrunnable(stage: CeleryStage, why: str) -> Signature:
    """Return a call that the worker refuses, or whose task it does not know."""
    if why == "unregistered":
        return stage.client.signature(f"{CANVAS}.nobody_knows", args=(1,))
    return stage.tasks.double.s(1).set(time_limit="soon")


CANNOT_RUN = pytest.mark.parametrize(
    ("why", "words"), [("unregistered", "nobody_knows"), ("refused", "class=timelimit")]
)


@CANNOT_RUN
def test_a_part_that_cannot_run_fails_its_chord(telling_stage: CeleryStage, why: str, words: str) -> None:
    stage = telling_stage
    result = chord([stage.tasks.add.s(1, 1), unrunnable(stage, why)])(stage.tasks.total.s())
    error = stage.error(result)
    assert type(error) is ChordError
    assert f"Dependency {result.parent.results[1].id} raised" in str(error)
    assert words in str(error)


@CANNOT_RUN
def test_a_chain_that_ends_before_its_chord_does_fails_it(telling_stage: CeleryStage, why: str, words: str) -> None:
    stage = telling_stage
    part = unrunnable(stage, why) | stage.tasks.double.s()
    error = stage.error(chord([stage.tasks.add.s(1, 1), part])(stage.tasks.total.s()))
    assert type(error) is ChordError
    assert words in str(error)


@CANNOT_RUN
@pytest.mark.parametrize("ignores", [False, True])
def test_error_callbacks_hear_of_a_call_that_cannot_run(
    telling_stage: CeleryStage, why: str, words: str, ignores: bool
) -> None:
    stage, t = telling_stage, telling_stage.tasks
    links = [t.error_by_id.s(), t.error_in_place.s()]
    result = unrunnable(stage, why).apply_async(link_error=links, ignore_result=ignores)
    stage.wait_for_notes("error_by_id", failed=result.id)
    [note] = stage.wait_for_notes("error_in_place", failed=result.id)
    assert words in note["error"]


@CANNOT_RUN
def test_an_error_callback_that_fails_has_no_other_called_twice(
    telling_stage: CeleryStage, why: str, words: str
) -> None:
    stage, t = telling_stage, telling_stage.tasks
    links = [t.error_by_id.s(), t.error_by_id.s().set(countdown="soon")]
    result = unrunnable(stage, why).apply_async(link_error=links)
    assert words in str(stage.error(result))
    stage.wait_for_notes("error_by_id", failed=result.id)
    stage.worker.wait_for_log("error callbacks of task .* could not be called")
    assert stage.get(t.double.delay(2)) == 4
    assert len(stage.notes("error_by_id", failed=result.id)) == 1


def test_a_task_is_added_to_its_chord(stage: CeleryStage) -> None:
    if stage.backend != "redis":
        pytest.skip("Celery adds to chords on Redis alone")
    t = stage.tasks
    assert get(stage, chord([t.add_more.s(1), t.add_more.s(2)], t.total.s())) == 1 + 2 + 101 + 102


# --- replacing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "value"), [("task", 6), ("chain", 12), ("group", [6, 7]), ("chord", 13), ("twice", 16)])
def test_a_task_goes_on_as_another(stage: CeleryStage, by: str, value: Any) -> None:
    t = stage.tasks
    result = t.replaced.delay(by, 5)
    assert stage.get(result) == value


def test_a_replaced_step_keeps_its_chain(stage: CeleryStage) -> None:
    t = stage.tasks
    assert get(stage, chain(t.replaced.s("chain", 5), t.double.s(), t.add.s(1))) == 25


@pytest.mark.since("5.7", "the values of a group that replaced a task of the header come in any order")
def test_a_replaced_header_task_keeps_its_chord(stage: CeleryStage) -> None:
    t = stage.tasks
    header = [t.replaced.s("task", 5), t.replaced.s("chain", 5), t.replaced.s("group", 5), t.add.s(1, 1)]
    assert get(stage, chord(header, t.identity.s())) == [6, 12, [6, 7], 2]


def test_callbacks_and_errbacks_go_with_the_replacement(stage: CeleryStage) -> None:
    t = stage.tasks
    good = t.replaced.apply_async(("task", 5), link=t.keep.s("after replacement"))
    bad = t.replaced.apply_async(("failure", 5), link_error=t.error_by_id.s())
    assert stage.get(good) == 6
    assert stage.wait_for_notes("kept", label="after replacement")[0]["value"] == 6
    assert type(stage.error(bad)) is PlainError
    stage.wait_for_notes("error_by_id", failed=bad.id)


# --- maps -------------------------------------------------------------------------------------------------------------


def test_maps_run_in_one_task(stage: CeleryStage) -> None:
    t = stage.tasks
    assert get(stage, t.total.map([[1, 2], [3, 4]])) == [3, 7]
    assert get(stage, t.add.starmap([(1, 2), (3, 4)])) == [3, 7]


def test_chunks_run_as_a_group_of_maps(stage: CeleryStage) -> None:
    t = stage.tasks
    result = t.add.chunks([(number, number) for number in range(10)], 4)()
    assert stage.get(result) == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]]


# --- stamps -----------------------------------------------------------------------------------------------------------


class Stamps(StampingVisitor):  # type: ignore[misc]
    """Puts the same stamps on everything."""

    def __init__(self, **stamps: Any) -> None:
        self.stamps = stamps

    def on_signature(self, sig: Signature, **headers: Any) -> dict[str, Any]:
        return {**self.stamps, "stamped_headers": list(self.stamps)}


def test_stamps_arrive_with_every_task_of_a_workflow(stage: CeleryStage) -> None:
    t = stage.tasks
    workflow = group(t.dump_stamps.s(), chain(t.add.si(1, 1), t.dump_stamps.s()))
    workflow.stamp(visitor=Stamps(tenant="a", trace=["x", "y"]))
    expected = {"stamps": {"tenant": "a", "trace": ["x", "y"]}, "stamped_headers": ["tenant", "trace"]}
    assert stage.get(workflow()) == [expected, expected]


def test_stamps_go_to_callbacks(stage: CeleryStage) -> None:
    t = stage.tasks
    signature = t.add.si(1, 1)
    signature.link(t.dump_stamps.s())
    signature.stamp(visitor=Stamps(tenant="b"))
    result = signature.apply_async()
    stage.get(result)
    (child,) = result.children
    assert stage.get(child)["stamps"] == {"tenant": "b"}


def test_a_plain_call_from_a_stamped_task_is_not_stamped(stage: CeleryStage) -> None:
    t = stage.tasks
    signature = t.call_stamped.si()
    signature.stamp(visitor=Stamps(tenant="c"))
    child = stage.client.AsyncResult(stage.get(signature.apply_async()))
    assert stage.get(child) == {"stamps": {}, "stamped_headers": []}


# --- together ---------------------------------------------------------------------------------------------------------


def test_a_workflow_of_everything(stage: CeleryStage) -> None:
    t = stage.tasks
    result = chain(
        t.add.s(1, 1),
        group(t.add.s(1), chain(t.double.s(), t.retry_once.s()), chord([t.add.s(5), t.add.s(6)], t.total.s())),
        t.total.s(),
        t.keep.s("the end"),
    )()
    assert stage.get(result) == 22
    assert [note["value"] for note in stage.wait_for_notes("kept", label="the end")] == [22]


def test_many_workflows_at_once(stage: CeleryStage) -> None:
    t = stage.tasks
    results = [
        chain(t.add.s(number, 1), chord([t.add.s(1), t.add.s(2)], t.total.s()), t.double.s())() for number in range(10)
    ]
    assert [stage.get(result) for result in results] == [2 * (2 * (number + 1) + 3) for number in range(10)]


# --- rpc:// -----------------------------------------------------------------------------------------------------------


def test_chains_callbacks_and_groups_on_rpc(rpc_stage: CeleryStage) -> None:
    t = rpc_stage.tasks
    assert get(rpc_stage, chain(t.add.s(1, 2), t.add.s(4), t.double.s())) == 14
    assert get(rpc_stage, group(t.add.s(number, number) for number in range(5))) == [0, 2, 4, 6, 8]
    assert rpc_stage.get(t.add.apply_async((1, 2), link=t.keep.s("rpc"))) == 3
    assert rpc_stage.wait_for_notes("kept", label="rpc")[0]["value"] == 3


def test_chords_are_refused_on_rpc(rpc_stage: CeleryStage) -> None:
    t = rpc_stage.tasks
    with pytest.raises(NotImplementedError, match="does not support chords"):
        chord([t.add.s(1, 1), t.add.s(2, 2)])(t.total.s())
