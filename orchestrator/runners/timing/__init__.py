"""The simulated runner: a clock moved over a Program, folded or in full."""
