"""Layout: the plan of degrees, the order of microbatches, and how each parameter and operator is cut over chips."""
