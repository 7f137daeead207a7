"""Small applications to start from; each also runs as a test."""
