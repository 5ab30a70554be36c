"""Checkpoints: what they hold, how they are written, checked, kept and turned into other formats."""
