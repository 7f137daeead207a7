"""From a call to its message."""
