"""``python -m tests.fuzz``, which ``ci/fuzz`` calls."""

import sys

from tests.fuzz.fuzz import main

sys.exit(main())
