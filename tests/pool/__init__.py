"""Processes and who replaces them."""
