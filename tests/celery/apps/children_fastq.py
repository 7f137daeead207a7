"""The tasks of ``children`` in a FastQ application, for the same client."""

from __future__ import annotations

import json
import os

from fastq import FastQ
from tests.celery.apps.children_probes import PROBES

settings = json.loads(os.environ["PROJ_SETTINGS"])
app = FastQ(
    "children",
    broker=settings["broker_url"],
    backend=settings["result_backend"],
    worker_hijack_root_logger=not os.environ.get("OWN_HANDLERS"),
)

for name, probe in PROBES.items():
    app.task(name=name)(probe)
