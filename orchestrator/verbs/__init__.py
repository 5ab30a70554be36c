"""Verbs: one question each, answered by one function from values to a value; the command line prints it."""
