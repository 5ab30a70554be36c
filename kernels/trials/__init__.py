"""What optimizers of users look at, read and keep, found by trial."""
