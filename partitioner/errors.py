"""Errors of the partitioner: what is wrong, where, and what to do about it.

The verbs turn them into the user's three short lines; nothing here knows how errors are printed.
"""


class PartitionError(ValueError):
    """The request cannot be turned into a Program (a plan, a model or a file is at fault)."""

    def __init__(self, problem: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.where = where
        self.hint = hint


class CaptureError(PartitionError):
    """The model cannot be captured as one graph."""


class ProgramError(PartitionError):
    """A Program breaks a rule: text that does not parse, or communication that would hang."""
