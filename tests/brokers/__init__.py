"""Brokers: each against the real server, and what all must do."""
