"""What applications are written with."""
