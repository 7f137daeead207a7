"""Bytes to values and back, compiled. No sockets, no clock."""
