"""The worker seen and steered from outside: remote control, events, revoked tasks."""
