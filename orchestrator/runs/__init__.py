"""Runs: what a run reads and leaves behind: data, checkpoints, metrics, timelines, the run directory."""
