"""How well and how fast plans are chosen and swept."""
