"""Settings: names, types, sources and their order, and what an error says."""

from __future__ import annotations

import types
from typing import Any

import pytest
from celery.app.defaults import _TO_NEW_KEY

from fastq.errors import SettingsError
from fastq.settings import ENVIRONMENT_NAMES, Settings, settings_of


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in ENVIRONMENT_NAMES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)


def test_the_embedded_broker_is_the_default_and_keeps_the_results_too() -> None:
    settings = Settings()
    settings.freeze()
    assert settings.broker_url == settings.result_backend == "sqlite:///fastq.db"


@pytest.mark.parametrize(
    ("broker", "backend"),
    [("memory://", "memory://"), ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"), ("amqp://host", "disabled")],
)
def test_results_follow_an_embedded_broker_and_are_off_with_amqp(broker: str, backend: str) -> None:
    settings = Settings({"broker_url": broker})
    settings.freeze()
    assert settings.result_backend == backend


def test_several_broker_urls_become_one_text() -> None:
    settings = Settings({"broker_url": ["amqp://a", "amqp://b"]})
    settings.freeze()
    assert settings.broker_url == "amqp://a;amqp://b"


@pytest.mark.parametrize("reliable", [True, False])
def test_acks_are_late_when_reliable(reliable: bool) -> None:
    settings = Settings({"fastq_reliable": reliable})
    settings.freeze()
    assert settings.task_acks_late is reliable
    early = Settings({"fastq_reliable": True, "task_acks_late": False})
    early.freeze()
    assert early.task_acks_late is False


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("broker_ulr", "broker_url"),
        ("task_serialiser", "task_serializer"),
        ("worker_prefetch_multipler", "worker_prefetch_multiplier"),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest_known_one(name: str, nearest: str) -> None:
    with pytest.raises(SettingsError, match=f"unknown setting '{name}'; did you mean '{nearest}'"):
        Settings({name: "x"})
    with pytest.raises(SettingsError, match=name):
        setattr(Settings(), name, "x")


def test_an_unknown_setting_that_resembles_nothing_says_so() -> None:
    with pytest.raises(SettingsError, match="no setting has a similar name"):
        Settings({"zzzzzzzz": 1})


@pytest.mark.parametrize(
    ("name", "lower"),
    [
        ("BROKER_URL", "broker_url"),
        ("CELERY_BROKER_URL", "broker_url"),
        ("celery_broker_url", "broker_url"),
        ("CELERY_BROKER_ULR", "broker_url"),
        ("CELERY_RESULT_BACKEND", "result_backend"),
        ("CELERY_ACCEPT_CONTENT", "accept_content"),
        ("CELERY_TASK_SERIALIZER", "task_serializer"),
        ("CELERY_ROUTES", "task_routes"),
        ("CELERY_ALWAYS_EAGER", "task_always_eager"),
        ("CELERY_TASK_RESULT_EXPIRES", "result_expires"),
        ("CELERY_SEND_EVENTS", "worker_send_task_events"),
        ("CELERYD_CONCURRENCY", "worker_concurrency"),
        ("CELERYD_TASK_TIME_LIMIT", "task_time_limit"),
        ("FASTQ_RELIABLE", "fastq_reliable"),
    ],
)
def test_an_old_or_upper_case_name_is_answered_with_the_lower_case_one(name: str, lower: str) -> None:
    with pytest.raises(SettingsError, match=rf"unknown setting '{name}'; did you mean '{lower}'\?"):
        Settings({name: "x"})


def test_every_old_name_of_celery_s_is_known_by_its_lower_case_one() -> None:
    for name, lower in _TO_NEW_KEY.items():
        words = f"unknown setting {name!r}; did you mean {lower!r}?"
        if lower not in Settings():
            with pytest.raises(SettingsError) as absent:
                Settings()[lower]
            words = str(absent.value).replace(repr(lower), repr(name))
        with pytest.raises(SettingsError) as raised:
            Settings()[name]
        assert str(raised.value) == words


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("task_default_exchange_type", "exchange_type"),
        ("task_retry_on_worker_lost", "fastq_reliable, the default, runs a call again"),
        ("CELERY_RETRY_ON_WORKER_LOST", "fastq_reliable, the default, runs a call again"),
        ("CELERYBEAT_SCHEDULE", "there is no scheduler"),
    ],
)
def test_a_setting_that_only_celery_has_is_named_with_what_there_is_instead(name: str, words: str) -> None:
    with pytest.raises(SettingsError, match=rf"'{name}' is Celery's, and .* have not got it \(yet\): .*{words}"):
        Settings({name: "x"})


@pytest.mark.parametrize(
    "option", ["pidfile", "logfile", "loglevel", "hostname", "autoscale", "uid", "gid", "umask", "executable"]
)
def test_an_option_of_the_worker_s_command_is_no_setting_and_said_to_be_one(option: str) -> None:
    for name in (f"worker_{option}", option, f"CELERYD_{option.upper()}"):
        with pytest.raises(SettingsError) as raised:
            Settings({name: "x"})
        assert str(raised.value) == f"unknown setting {name!r}; it is an option: `fastq -A <module> worker --{option}`"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("task_default_queue", 5, "str"),
        ("worker_concurrency", "4", "an int >= 0 or None"),
        ("worker_concurrency", True, "an int >= 0 or None"),
        ("worker_concurrency", -1, "an int >= 0 or None"),
        ("worker_max_tasks_per_child", 2.5, "an int >= 0 or None"),
        ("task_time_limit", "1 hour", "a number >= 0 or None"),
        ("task_time_limit", float("inf"), "a number >= 0 or None"),
        ("task_always_eager", "yes", "True or False"),
        ("task_always_eager", 1, "True or False"),
        ("accept_content", "json", "a list of str"),
        ("accept_content", ["json", 5], "a list of str"),
        ("task_default_queue_type", "stream", "'classic' or 'quorum'"),
        ("task_default_delivery_mode", True, "1 or 2"),
        ("task_publish_retry_policy", [1], "a dict with text keys"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_is_expected(name: str, value: Any, expected: str) -> None:
    with pytest.raises(SettingsError) as raised:
        Settings({name: value})
    assert str(raised.value) == f"setting {name!r} is {value!r}; expected {expected}"


@pytest.mark.parametrize("name", ["broker_url", "result_backend", "broker_transport_options"])
def test_an_error_never_shows_a_value_that_may_hold_a_password(name: str) -> None:
    with pytest.raises(SettingsError) as raised:
        Settings({name: [b"amqp://user:secret@host"]})
    assert "secret" not in str(raised.value)
    assert "secret" not in repr(Settings({"broker_url": "amqp://user:secret@host"}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task_time_limit", 5),
        ("task_time_limit", None),
        ("task_queues", ["a", "b"]),
        ("task_queues", ("a",)),
        ("task_queues", {"a"}),
        ("broker_use_ssl", {"ca_certs": "/x"}),
        ("broker_use_ssl", True),
        ("task_routes", [1, 2]),
    ],
)
def test_values_of_the_right_type_are_taken(name: str, value: Any) -> None:
    assert Settings({name: value})[name] in (value, tuple(value) if isinstance(value, (list, set)) else value)


def test_a_list_or_dict_cannot_be_changed_behind_the_checks() -> None:
    queues, options = ["a"], {"x": 1}
    settings = Settings({"task_queues": queues, "broker_transport_options": options})
    queues.append("b")
    options["y"] = 2
    assert settings.task_queues == ("a",)
    assert settings.broker_transport_options == {"x": 1}
    with pytest.raises(TypeError):
        settings.broker_transport_options["z"] = 3  # type: ignore[index]


def test_the_order_of_the_sources_decides_and_not_the_order_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTQ_BROKER_URL", "memory://environment")
    settings = Settings({"task_default_queue": "keyword", "broker_url": "memory://keyword"})
    settings.load({"task_default_queue": "config", "task_serializer": "config", "broker_url": "memory://config"})
    assert (settings.task_default_queue, settings.task_serializer) == ("keyword", "config")
    settings.task_default_queue = "assigned"
    settings.load({"task_default_queue": "config again"})
    settings.freeze()
    assert settings.task_default_queue == "assigned"
    assert settings.broker_url == "memory://environment"


def test_an_assignment_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTQ_BROKER_URL", "memory://environment")
    settings = Settings()
    settings.broker_url = "memory://assigned"
    settings.freeze()
    assert settings.broker_url == "memory://assigned"


@pytest.mark.parametrize(("setting", "variables"), ENVIRONMENT_NAMES.items())
def test_the_environment_is_read_under_our_name_and_then_celerys(
    monkeypatch: pytest.MonkeyPatch, setting: str, variables: tuple[str, str]
) -> None:
    monkeypatch.setenv(variables[1], "memory://celery")
    second = Settings()
    second.freeze()
    assert second[setting] == "memory://celery"
    monkeypatch.setenv(variables[0], "memory://ours")
    first = Settings()
    first.freeze()
    assert first[setting] == "memory://ours"


def test_after_the_first_use_a_change_is_refused_with_a_remedy() -> None:
    settings = Settings()
    settings.freeze()
    settings.freeze()
    with pytest.raises(SettingsError, match=r"'task_serializer' cannot change any more.*app\.override"):
        settings.task_serializer = "yaml"


def test_override_changes_and_restores_even_after_an_error() -> None:
    settings = Settings({"task_default_queue": "a"})
    settings.freeze()
    before = settings.changes()
    with settings.override(task_default_queue="b", task_time_limit=3):
        assert (settings.task_default_queue, settings.task_time_limit) == ("b", 3)
    assert settings.changes() == before
    with pytest.raises(ZeroDivisionError), settings.override(task_time_limit=3):
        assert settings.task_time_limit == 1 / 0
    assert settings.changes() == before
    with pytest.raises(SettingsError):
        settings.task_time_limit = 3


def test_a_wrong_override_changes_nothing() -> None:
    settings = Settings()
    settings.freeze()
    with pytest.raises(SettingsError), settings.override(task_time_limit="x"):
        pass
    assert settings.task_time_limit is None
    with pytest.raises(SettingsError, match="cannot change"):
        settings.task_time_limit = 3


def test_settings_work_as_attributes_items_and_updates() -> None:
    settings = Settings()
    settings["task_serializer"] = "yaml"
    settings.update({"task_time_limit": 3}, task_default_queue="q")
    assert settings["task_serializer"] == settings.task_serializer == "yaml"
    assert settings.changes() == {"task_default_queue": "q", "task_serializer": "yaml", "task_time_limit": 3}
    assert "task_serializer" in settings
    assert "no_such" not in settings
    with pytest.raises(SettingsError):
        settings["no_such"]


# --- configuration sources --------------------------------------------------------------------------------------------


class Config:
    task_serializer = "yaml"
    helper = "not a setting"
    TASK_TIME_LIMIT = 5


class DerivedConfig(Config):
    task_default_queue = "derived"


def test_an_object_or_class_gives_the_names_that_are_settings() -> None:
    assert settings_of(Config) == settings_of(Config()) == {"task_serializer": "yaml"}
    assert settings_of(DerivedConfig()) == {"task_serializer": "yaml", "task_default_queue": "derived"}


def test_a_module_gives_the_names_that_are_settings_and_those_that_look_so() -> None:
    module = types.ModuleType("celeryconfig")
    vars(module).update(broker_url="memory://", include=["a"], task_serialiser="x", os=types, base_dir="/")
    assert settings_of(module) == {"broker_url": "memory://", "include": ["a"], "task_serialiser": "x"}
    with pytest.raises(SettingsError, match="did you mean 'task_serializer'"):
        Settings().load(settings_of(module))


def test_a_mapping_gives_every_key() -> None:
    assert settings_of({"anything": 1}) == {"anything": 1}


def test_a_namespace_selects_upper_case_names_as_in_django() -> None:
    source = {"CELERY_TASK_TIME_LIMIT": 5, "CELERY_NONSENSE": 1, "task_time_limit": 9, "SECRET_KEY": "x"}
    expected = {"task_time_limit": 5, "nonsense": 1}
    assert settings_of(source, "CELERY") == settings_of(source, "celery_") == expected
    assert settings_of(types.SimpleNamespace(**source), "CELERY") == expected
