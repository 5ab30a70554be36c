"""Products in a captured graph: which dims of parameters they run over, and where tensor parallelism cuts them."""
