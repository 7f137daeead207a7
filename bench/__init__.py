"""Benchmarks: `python -m bench` compares whole systems, `pytest bench` measures the parts."""
