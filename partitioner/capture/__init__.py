"""Capture: any PyTorch module becomes one graph of operators, cut into units, with its loss as sum and count."""
