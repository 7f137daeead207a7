"""One module per system: its application, and the producer's half of each measurement.

A peer runs in its own interpreter, where nothing of fastq needs to be installed; counter and client are all they share.
Everything that varies comes from the environment: BENCH_BROKER, BENCH_BACKEND, BENCH_COUNTER; BENCH_TASK says what
is sent: noop; nap, which waits NAP_S as a call to a service does; hold, which waits until the worker's end.
"""

import os

NAP_S = 0.01
HOLD_S = 3600.0
TASK = os.environ.get("BENCH_TASK", "noop")
