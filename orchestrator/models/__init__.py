"""Models: from a name in a job to a module."""
