"""Execution with real tensors: chips, their exchange of tensors, and the runner in one process."""
