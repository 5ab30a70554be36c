"""What chips compute and how fast: the chip catalog, kernels, optimizers. Importing it loads no torch."""
