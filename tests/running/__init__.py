"""A child and what it does with a call."""
