"""What talking to any server takes: URLs, TCP, TLS. Knows no protocol."""
