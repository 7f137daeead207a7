"""python -m examples.celery_django."""

import sys

from examples.celery_django.run import main

if __name__ == "__main__":
    sys.exit(main())
