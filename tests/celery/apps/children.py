"""A Celery application whose tasks tell what they find in their process."""

from __future__ import annotations

import json
import os

from tests.celery.apps.children_probes import PROBES
from tests.celery.proj.app import make_app

app = make_app({**json.loads(os.environ.get("PROJ_SETTINGS", "{}")), "include": ()})

for name, probe in PROBES.items():
    app.task(name=name)(probe)
