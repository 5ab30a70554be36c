"""Runners: what carries out a Program: the clock alone, one process with real tensors, or Ray actors."""
