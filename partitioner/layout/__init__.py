"""Layout: the plan of degrees, the order of microbatches, and how a unit is cut over chips."""
