"""The worker as a process of its system: leaving the terminal, files, signals, logs, exit codes."""
