"""Capture: any PyTorch module becomes one graph of operators, cut into units, with its loss and its tp styles."""
