"""The embedded broker: messages and results in a SQLite file, and the doorbells beside it."""
