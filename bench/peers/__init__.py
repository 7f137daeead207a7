"""One module per system: its application, and the producer's half of each measurement.

A peer runs in its own interpreter, where nothing of fastq needs to be installed; counter and client are all they share.
Everything that varies comes from the environment: BENCH_BROKER, BENCH_BACKEND, BENCH_COUNTER.
"""
