"""Random messages and commands to running workers."""
