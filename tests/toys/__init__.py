"""Parts as other packages would bring them, each one file; ``docs/extending.md`` shows them."""
