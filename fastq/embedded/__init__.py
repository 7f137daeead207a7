"""What the embedded brokers and result stores share: the SQLite file, the doorbells beside it, and memory:// spaces."""
