"""Python state: what code reads besides tensors, from its bytecode, from objects, and by running it once more."""
