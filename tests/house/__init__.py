"""The project itself: layers, lint, types, documents, examples, benchmark."""
