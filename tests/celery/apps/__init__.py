"""Applications with classes of their own inside the worker: strategies, requests, steps."""
