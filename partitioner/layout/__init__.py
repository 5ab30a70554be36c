"""Layout: the plan of degrees, and how each parameter and operator is cut over chips."""
