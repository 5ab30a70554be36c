"""Errors: what went wrong, where, and what to do, in three short lines.

    OrchestrateError
    +-- UserError(problem, where, hint)    the reader can mend it; exit code 2
        +-- ConfigError                    a file or an override that is not valid
        +-- ClusterError                   a cluster that cannot be, or has too few chips
        +-- PlanError                      degrees, stages or schedules that do not fit together
        +-- DataError                      a data file that is missing, empty or too short
        +-- ModelError                     a model that is unknown or cannot be built
        +-- CaptureError                   a model whose graph cannot be captured
        +-- FitError                       does not fit in memory; exit code 3
        +-- RunError                       a run that ended early; exit code 1
        +-- HangError                      chips that wait for each other or went silent; exit code 4

A user error is printed without a traceback. What is not an OrchestrateError is our bug.
"""

from collections.abc import Sequence
from typing import ClassVar, TypeVar


class OrchestrateError(Exception):
    """Any error that orchestrate raises on purpose."""

    exit_code: ClassVar[int] = 1


class UserError(OrchestrateError):
    """An error that the reader can mend: `problem`, `where` it is, a `hint` what to do. May lead others."""

    exit_code: ClassVar[int] = 2

    def __init__(self, problem: str, where: str, hint: str, others: Sequence["UserError"] = ()) -> None:
        # All arguments go to Exception, so that the error survives pickling between actors.
        super().__init__(problem, where, hint, tuple(others))
        self.problem = problem
        self.where = where
        self.hint = hint
        self.others = tuple(others)

    @property
    def findings(self) -> tuple["UserError", ...]:
        """This error and those it leads, in order."""
        return (self, *self.others)

    def __str__(self) -> str:
        own = f"{self.problem}\n  at: {self.where}\n  do: {self.hint}"
        return "\n".join((own, *map(str, self.others)))


class ConfigError(UserError):
    """A file or an override that is not valid."""


class ClusterError(UserError):
    """A cluster that cannot be."""


class PlanError(UserError):
    """A plan whose parts do not fit together."""


class DataError(UserError):
    """Data that is missing, empty or too short."""


class ModelError(UserError):
    """A model that is unknown or cannot be built."""


class CaptureError(UserError):
    """A model whose graph cannot be captured."""


class FitError(UserError):
    """A plan that does not fit in memory."""

    exit_code: ClassVar[int] = 3


class RunError(UserError):
    """A run that ended before its last step."""

    exit_code: ClassVar[int] = 1


class HangError(UserError):
    """Chips that wait for each other, or that went silent."""

    exit_code: ClassVar[int] = 4


ErrorT = TypeVar("ErrorT", bound=UserError)


def combined(errors: Sequence[ErrorT]) -> ErrorT:
    """One error that leads all of `errors` (at least one), for a file that is wrong in several places."""
    first = errors[0]
    return type(first)(first.problem, first.where, first.hint, errors[1:])
