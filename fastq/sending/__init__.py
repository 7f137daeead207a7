"""From a call to its message: options, routes and the envelope that a task keeps. Publishes nothing."""
