"""One behaviour around a call per file."""
