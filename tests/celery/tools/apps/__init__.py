"""One small application per tool. As a program, a module is the client: it sends tasks and prints a JSON value."""
