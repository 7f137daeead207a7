"""django-celery-beat: its scheduler, in `celery beat` or `worker -B`, feeds the worker, and the rows say what ran."""

from __future__ import annotations

import pytest

from tests.celery.tools.test_django_results import rows
from tests.celery.tools.tool import Tool, wait_for

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]

RAN = "SELECT periodic_task_name, status, result FROM django_celery_results_taskresult"
PLANNED = "SELECT name, total_run_count > 0, last_run_at IS NOT NULL, enabled FROM django_celery_beat_periodictask"
ONCE = ("once", 0, 0, 0)  # an entry that ran its one time is reset and off


@pytest.mark.parametrize("is_inside", [False, True], ids=["beat", "worker -B"])
def test_what_the_schedule_in_the_database_says_is_run(tool: Tool, is_inside: bool) -> None:
    tool.client("django_site", "migrate")
    tool.client("django_site", "plan")
    scheduler = "django_celery_beat.schedulers:DatabaseScheduler"
    worker, beat_log = tool.worker_and_beat("django_site", scheduler, is_inside)
    regular, single = ("each second", "SUCCESS", '"ticked regular"'), ("once", "SUCCESS", '"ticked single"')
    wait_for(
        lambda: rows(tool, RAN).count(regular) >= 2 and single in rows(tool, RAN) and ONCE in rows(tool, PLANNED),
        30.0,
        lambda: f"{rows(tool, RAN)}\n{beat_log()}\n{worker.log()}",
    )
    assert set(rows(tool, f"{RAN} WHERE status = 'SUCCESS'")) == {regular, single}
    assert rows(tool, f"{RAN} WHERE periodic_task_name = 'once'") == [single]
    # What it counts itself is written when it ends.
    tool.close()
    assert worker.stop() == 0
    planned = set(rows(tool, PLANNED))
    assert {("each second", 1, 1, 1), ONCE, ("off", 0, 0, 0)} <= planned
