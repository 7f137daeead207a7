"""The broker in this process: spaces that ``memory://`` URLs name, with messages and results."""
