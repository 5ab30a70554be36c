"""Memory: the peak of every role, and what a segment needs beyond its inputs."""
