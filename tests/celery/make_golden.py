"""Write what stock Celery sends for every call: python -m tests.celery.make_golden AMQP_URL REDIS_URL

Run by hand when the calls change, against an empty virtual host and an empty database.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from pathlib import Path

import celery
import kombu

from tests.celery.golden_calls import Collect, Tasks, amqp_collector, redis_collector, send_all

FOLDER = Path(__file__).parent / "golden"


def make(name: str, url: str, collector: contextlib.AbstractContextManager[Collect]) -> None:
    """Write the file of one broker."""
    tasks = Tasks(url)
    with collector as collect:
        sent = send_all(tasks, collect)
    tasks.app.close()
    made_by = {"celery": celery.__version__, "kombu": kombu.__version__}
    text = json.dumps({"made_by": made_by, "messages": sent}, indent=1, ensure_ascii=True)
    (FOLDER / f"{name}.json").write_text(text + "\n", encoding="ascii")
    print(f"{name}: {len(sent)} calls, {sum(map(len, sent.values()))} messages")


def main() -> None:
    """Write both files."""
    amqp_url, redis_url = sys.argv[1:]
    warnings.simplefilter("ignore")
    make("rabbitmq", amqp_url, amqp_collector(amqp_url))
    make("redis", redis_url, redis_collector(redis_url))


if __name__ == "__main__":
    main()
