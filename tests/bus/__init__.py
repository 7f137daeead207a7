"""Remote control and events: what their messages look like, and the connection on each broker."""
