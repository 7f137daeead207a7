"""Processes: the zygote that forks them, the supervisor that keeps slots filled."""
