"""Hierarchical algorithms: level by level over hosts, racks and tori."""
