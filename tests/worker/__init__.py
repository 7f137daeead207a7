"""Whole workers."""
