"""A package whose `tasks` module only autodiscovery finds."""
