"""Calibration: measured tables, and the constants of links fitted to them."""
