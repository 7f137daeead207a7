"""URLs, TCP and TLS."""
