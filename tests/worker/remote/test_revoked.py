"""The set of revoked tasks, its bounds, and its file, which Celery reads and writes as well."""

from __future__ import annotations

import dbm
import pickle
from pathlib import Path

import pytest
from celery.utils.collections import LimitedSet
from celery.worker import state as celery_state
from kombu.clocks import LamportClock as KombuClock

from fastq.errors import SettingsError
from fastq.worker.remote.clock import LamportClock
from fastq.worker.remote.revoked import Revoked, StateFile, revoked_from_environment
from tests.support.control_node import row


def test_ids_are_kept_in_the_order_of_their_revocation() -> None:
    revoked = Revoked()
    revoked.update(["a", "b", "c", "a"])
    assert list(revoked) == ["b", "c", "a"]
    assert "a" in revoked
    assert "x" not in revoked
    assert len(revoked) == 3


def test_the_oldest_are_forgotten_when_there_are_too_many() -> None:
    revoked = Revoked(max_ids=3)
    revoked.update("abcde")
    assert list(revoked) == ["c", "d", "e"]


def test_what_is_too_old_is_forgotten_at_a_purge(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("fastq.worker.remote.revoked.time.monotonic", lambda: clock[0])
    revoked = Revoked(expires_s=10)
    revoked.update(["old"])
    clock[0] = 111.0
    revoked.update(["new"])
    assert list(revoked) == ["old", "new"]
    revoked.purge()
    assert list(revoked) == ["new"]


def test_an_id_of_absurd_length_is_not_kept() -> None:
    revoked = Revoked()
    revoked.update(["x" * 2000])
    assert len(revoked) == 0


def test_fifty_thousand_more_ids_take_no_time() -> None:
    revoked = Revoked()
    revoked.update(map(str, range(50_000)))
    for number in range(50_000, 60_000):
        revoked.update([str(number)])
    assert len(revoked) == 50_000
    assert "9999" not in revoked
    assert "10000" in revoked


def test_a_stamp_revokes_a_task_when_it_is_seen() -> None:
    revoked = Revoked()
    stamped = row("t", "1", headers={"stamped_headers": ["a"], "stamps": {"a": "x"}})["props"]
    assert not revoked.see("1", stamped)
    revoked.add_stamps({"a": {"x", "y"}})
    assert revoked.see("1", stamped)
    assert "1" in revoked
    assert not revoked.see("2", row("t", "2")["props"])
    assert not revoked.see("3", b"\xff")


def test_stamps_are_bounded() -> None:
    revoked = Revoked()
    revoked.add_stamps({"a": set(map(str, range(5000)))})
    assert len(revoked.stamps["a"]) == 1000


def test_the_bounds_come_from_celery_s_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_WORKER_REVOKES_MAX", "2")
    revoked = revoked_from_environment()
    revoked.update("abc")
    assert list(revoked) == ["b", "c"]
    monkeypatch.setenv("CELERY_WORKER_REVOKE_EXPIRES", "soon")
    with pytest.raises(SettingsError, match="CELERY_WORKER_REVOKE_EXPIRES is 'soon'"):
        revoked_from_environment()


# -- the file


def test_what_was_saved_is_there_after_a_restart(tmp_path: Path) -> None:
    file = StateFile(str(tmp_path / "state"))
    revoked, clock = Revoked(), LamportClock(41)
    file.load(revoked, clock)
    revoked.update(["a", "b"])
    file.save(revoked, clock)
    again, later = Revoked(), LamportClock()
    StateFile(file.path).load(again, later)
    assert list(again) == ["a", "b"]
    assert later.value > 41


def test_celery_reads_what_we_write(tmp_path: Path) -> None:
    file = StateFile(str(tmp_path / "state"))
    revoked, clock = Revoked(), LamportClock(41)
    revoked.update(["ours-1", "ours-2"])
    file.save(revoked, clock)
    celery_state.revoked.clear()
    theirs = KombuClock()
    persistent = celery_state.Persistent(celery_state, file.path, theirs)
    try:
        assert list(celery_state.revoked) == ["ours-1", "ours-2"]
        assert theirs.value > 41
    finally:
        persistent.close()
        celery_state.revoked.clear()


def test_we_read_what_celery_writes(tmp_path: Path) -> None:
    path = str(tmp_path / "state")
    celery_state.revoked.clear()
    persistent = celery_state.Persistent(celery_state, path, KombuClock(70))
    celery_state.revoked.update(["theirs-1", "theirs-2"])
    persistent.save()
    celery_state.revoked.clear()
    revoked, clock = Revoked(), LamportClock()
    StateFile(path).load(revoked, clock)
    assert list(revoked) == ["theirs-1", "theirs-2"]
    assert clock.value > 70


def test_the_form_before_celery_4_is_read(tmp_path: Path) -> None:
    path = str(tmp_path / "state")
    with dbm.open(path, "c") as file:
        file[b"revoked"] = pickle.dumps(LimitedSet(data={"a": 1.0}))
    revoked = Revoked()
    StateFile(path).load(revoked, LamportClock())
    assert list(revoked) == ["a"]


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("value", [pickle.dumps(Bomb()), b"no pickle", b"", pickle.dumps(b"no zlib")])
def test_a_file_that_is_no_state_file_is_refused_with_a_remedy(tmp_path: Path, value: bytes) -> None:
    path = str(tmp_path / "state")
    with dbm.open(path, "c") as file:
        file[b"zrevoked"] = value
    with pytest.raises(SettingsError, match="Remove it, or name another one with --statedb"):
        StateFile(path).load(Revoked(), LamportClock())


def test_a_file_of_another_kind_or_place_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("hello")
    for path in (text, tmp_path / "missing" / "state"):
        with pytest.raises(SettingsError, match="cannot be used"):
            StateFile(str(path)).load(Revoked(), LamportClock())
    with pytest.raises(OSError, match="cannot be written"):
        StateFile(str(text)).save(Revoked(), LamportClock())
