"""How fast and how far runs scale, measured."""
