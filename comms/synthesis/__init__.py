"""Synthesis: schedules made for one network, and the bounds that no schedule can beat."""
