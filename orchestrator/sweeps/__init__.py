"""Sweeps: a job over many numbers of chips and what varies with them, predicted, measured, and what follows."""
