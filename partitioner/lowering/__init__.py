"""Lowering: a captured graph and a plan become one Program per role."""
