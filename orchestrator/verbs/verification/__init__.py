"""Verification: the two sides of a comparison, how far they are apart, and where they differ first."""
