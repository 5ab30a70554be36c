"""Splitting samples: which dim of every captured value holds samples, and what must be added up or gathered."""
