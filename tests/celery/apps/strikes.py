"""A Celery application whose tasks send and store a great deal, and are struck by limits and alarms meanwhile."""

from __future__ import annotations

import json
import os

from tests.celery.apps.strikes_tasks import add_tasks
from tests.celery.proj.app import make_app

app = make_app({**json.loads(os.environ.get("PROJ_SETTINGS", "{}")), "include": ()})
add_tasks(app)
