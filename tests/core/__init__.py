"""The message loop with real children."""
