"""A worker's options: ranges, names, and how they meet the settings."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from fastq.errors import SettingsError
from fastq.pool import Group, find_pool
from fastq.settings import Settings
from fastq.worker import options as module
from fastq.worker.groups import groups_of
from fastq.worker.options import WorkerOptions, available_cpus, chosen_queues, expand_path, node_name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "fastq@host.example.org"),
        ("w1@%h", "w1@host.example.org"),
        ("w1@%n", "w1@host"),
        ("w1@%d", "w1@example.org"),
        ("w1@100%%", "w1@100%"),
        ("w1@%%n", "w1@%n"),
        ("w1@%x", "w1@%x"),
        ("%n@%h", "host@host.example.org"),
        ("other", "fastq@other"),
        ("@other", "fastq@other"),
    ],
)
def test_a_node_name_is_expanded(given: str, expected: str) -> None:
    assert node_name(given, "host.example.org") == expected


def test_the_default_node_name_is_that_of_the_machine() -> None:
    assert WorkerOptions().hostname == f"fastq@{socket.gethostname()}"


@pytest.mark.parametrize(
    ("path", "index", "expected"),
    [
        ("/run/%n.pid", 0, "/run/w1.pid"),
        ("/log/%p%I.log", 0, "/log/w1@host.example.org.log"),
        ("/log/%n%I.log", 3, "/log/w1-3.log"),
        ("/log/%i/%h/%d", 0, "/log/0/host.example.org/example.org"),
        ("/log/%i", 3, "/log/3"),
        ("100%%", 0, "100%"),
        ("", 0, ""),
    ],
)
def test_a_path_is_expanded(path: str, index: int, expected: str) -> None:
    assert expand_path(path, "w1@host.example.org", index) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [("concurrency", -1), ("prefetch_multiplier", -1), ("max_tasks_per_child", 0), ("max_memory_per_child", 0),
     ("time_limit", -0.1), ("soft_time_limit", -1), ("grace_s", -1)],
)  # fmt: skip
def test_a_number_out_of_range_names_its_option(field: str, value: float) -> None:
    option = field.removesuffix("_s").replace("_", "-")
    with pytest.raises(SettingsError, match=f"--{option} is {value}; it must be . or more"):
        WorkerOptions(**{field: value})


def test_no_children_at_all_are_refused() -> None:
    with pytest.raises(SettingsError, match="--concurrency is 0; it must be 1 or more"):
        WorkerOptions(concurrency=0).resolved(Settings())


def test_an_application_s_own_word_stands_for_the_part_of_the_name_that_was_not_given() -> None:
    here = socket.gethostname()
    assert WorkerOptions().named("celery").hostname == f"celery@{here}"
    assert WorkerOptions(hostname="other").named("celery").hostname == "celery@other"
    assert WorkerOptions(hostname="w1@%%n").named("celery").hostname == "w1@%n"


def test_settings_fill_in_what_was_not_asked_for() -> None:
    settings = Settings({"worker_concurrency": 3, "task_time_limit": 9.0, "worker_max_tasks_per_child": 50})
    full = WorkerOptions(time_limit=5.0).resolved(settings)
    assert (full.concurrency, full.time_limit, full.soft_time_limit, full.max_tasks_per_child) == (3, 5.0, None, 50)
    assert (full.prefetch_multiplier, full.queues, full.reliable) == (4, ("celery",), True)


def test_the_number_of_children_is_that_of_the_processors_by_default() -> None:
    assert WorkerOptions().resolved(Settings()).concurrency == available_cpus()


def test_a_name_is_expanded_once() -> None:
    assert WorkerOptions(hostname="w@%%n").resolved(Settings()).hostname == "w@%n"


def test_a_zero_limit_overrides_the_settings() -> None:
    assert WorkerOptions(time_limit=0).resolved(Settings({"task_time_limit": 9.0})).time_limit == 0


@pytest.mark.parametrize(
    ("asked", "settings", "expected"),
    [
        ({}, {}, 25.0),
        ({"grace_s": 3.0}, {}, 3.0),
        ({"reliable": False}, {}, None),
        ({"reliable": False}, {"fastq_grace_s": 10.0}, 10.0),
        ({}, {"fastq_reliable": False}, None),
        ({"reliable": True}, {"fastq_reliable": False}, 25.0),
    ],
)
def test_compat_waits_for_running_tasks_without_end_unless_told(
    asked: dict[str, object], settings: dict[str, object], expected: float | None
) -> None:
    assert WorkerOptions(**asked).resolved(Settings(settings)).grace_s == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "settings", "expected"),
    [(None, {}, True), (2, {}, False), (None, {"worker_prefetch_multiplier": 4}, False)],
)
def test_a_prefetch_that_was_asked_for_is_kept_to(
    asked: int | None, settings: dict[str, object], expected: bool
) -> None:
    assert WorkerOptions(prefetch_multiplier=asked).resolved(Settings(settings)).adapts_prefetch is expected


@pytest.mark.parametrize(
    ("asked", "excluded", "declared", "expected"),
    [
        ((), (), None, ("celery",)),
        ((), (), ["a", "b"], ("a", "b")),
        (("b", "a", "b"), (), ["a", "b"], ("b", "a")),
        ((), ("a", "unknown"), ["a", "b"], ("b",)),
        (("x",), (), ["a"], ("x",)),
    ],
)
def test_queues_are_chosen_and_left_out(
    asked: tuple[str, ...], excluded: tuple[str, ...], declared: list[str] | None, expected: tuple[str, ...]
) -> None:
    assert chosen_queues(asked, excluded, Settings({"task_queues": declared})) == expected


def test_a_queues_alias_stands_for_its_name_and_what_is_only_declared_is_read_when_asked_for() -> None:
    queues = ["a", {"name": "bcast.1", "alias": "news"}, {"name": "b", "consume": False}]
    settings = Settings({"task_queues": queues, "task_create_missing_queues": False})
    assert chosen_queues((), (), settings) == ("a", "bcast.1")
    assert chosen_queues(("news", "b"), (), settings) == ("bcast.1", "b")
    assert chosen_queues((), ("news",), settings) == ("a",)


def test_worker_direct_adds_the_nodes_own_queue_whatever_was_asked_for() -> None:
    options = WorkerOptions(hostname="w1@host", queues=("a",))
    assert options.resolved(Settings({"worker_direct": True})).queues == ("a", "w1@host.dq2")
    assert options.resolved(Settings()).queues == ("a",)


def test_an_undeclared_queue_is_refused_where_none_is_to_be_created() -> None:
    settings = Settings({"task_queues": ["a", "b"], "task_create_missing_queues": False})
    assert chosen_queues(("a",), (), settings) == ("a",)
    with pytest.raises(SettingsError, match=r"unknown queue 'c'; declared: a, b. Add it to task_queues"):
        chosen_queues(("a", "c"), (), settings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000\n", None), ("150000 100000\n", 2), ("200000 100000\n", 2), ("1000 100000\n", 1), ("odd\n", None)],
)
def test_the_quota_of_a_control_group_is_rounded_up(tmp_path: Path, text: str, expected: int | None) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert module._quota_cpus(str(file)) == expected
    assert module._quota_cpus(str(tmp_path / "none")) is None


@pytest.mark.parametrize(
    ("pool", "given", "settings", "expected"),
    [
        ("prefork", {}, {}, [Group("one", 3), Group("loop", 1, 1000)]),
        ("threads", {}, {}, [Group("threads", 1, 3), Group("loop", 1, 1000)]),
        ("gevent", {"processes": 2}, {}, [Group("gevent", 2, 3), Group("loop", 1, 1000)]),
        ("prefork", {}, {"fastq_async_processes": 2, "fastq_async_slots": 5}, [Group("one", 3), Group("loop", 2, 5)]),
        ("prefork", {"async_slots": 7}, {"fastq_async_slots": 5}, [Group("one", 3), Group("loop", 1, 7)]),
        ("prefork", {"async_processes": 0}, {}, [Group("one", 3)]),
        ("asyncio", {}, {}, [Group("loop", 1, 3)]),
        ("solo", {}, {}, [Group("one", 1)]),
    ],
)
def test_coroutine_functions_have_children_of_their_own_where_there_are_some(
    pool: str, given: dict[str, int], settings: dict[str, int], expected: list[Group]
) -> None:
    options = WorkerOptions(concurrency=3, pool=pool, **given).resolved(Settings(settings))
    assert list(groups_of(options, find_pool(pool), has_async=True)) == expected
    assert list(groups_of(options, find_pool(pool), has_async=False)) == expected[:1]
