"""Results in the SQLite file of the embedded broker, for callers."""
