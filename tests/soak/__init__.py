"""A soak: mixed tasks for minutes or hours under faults, counted by a ledger outside. `python -m tests.soak --help`."""
