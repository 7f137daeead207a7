"""The tasks of ``strikes`` in a FastQ application, for the same client."""

from __future__ import annotations

import json
import os

from fastq import FastQ
from tests.celery.apps.strikes_tasks import add_tasks

settings = json.loads(os.environ["PROJ_SETTINGS"])
app = FastQ("strikes", broker=settings["broker_url"], backend=settings["result_backend"])
add_tasks(app)
