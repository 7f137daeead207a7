"""Bytes to values and back, compiled. No connections; only the pipe between processes makes system calls of its own."""
