"""Errors: what went wrong, where, and what to do, in three short lines; and exit codes. All packages raise these.

    UserError(problem, where, hint)    the reader can mend it; exit code 2
    +-- ConfigError                    a file, a flag or an override that is not valid
    |   +-- UnitError                  a quantity that cannot be read
    |   +-- ChipError                  a chip that is not in the catalog, or a figure of it that cannot be read
    |   +-- ClusterError               a cluster that cannot be, or has too few chips
    |       +-- CommsError             what is asked of its network: a topology, a schedule, a measurement
    |           +-- TooManyMessages    a collective too large to be followed message by message
    +-- PlanError                      degrees, stages or schedules that do not fit together
    |   +-- OptimizerError             an optimizer that cannot step on flat shards
    |   +-- PartitionError             a plan that the model cannot be cut by
    |       +-- ProgramError           a Program that breaks a rule: its text, or communication that would hang
    |           +-- SegmentError       an operation that cannot be compiled
    +-- DataError                      a data file that is missing, empty or too short
    +-- ModelError                     a model that is unknown or cannot be built
    +-- CaptureError                   a model that cannot be captured as one graph
    +-- FitError                       does not fit in memory; exit code 3
    +-- RunError                       a run that ended early; exit code 1
    |   +-- TimelineFormatError        bytes that are no timeline
    +-- DifferenceError                a split run that is not the same training as one chip's; exit code 5
    +-- HangError                      chips that wait for each other or went silent; exit code 4

A user error is printed without a traceback; anything else is our bug. Who raises says what is known there, and
`located` adds the rest on the way up: where a deeper error knows no place in a file, or nothing to do about it.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, TypeVar

PUBLIC = "orchestrator.exceptions"  # where users find these: a traceback and a pickle name it
MOST_OF_LINE = 2000  # characters


class UserError(Exception):
    """An error that the reader can mend: `problem`, `where` it is, a `hint` what to do. May lead others."""

    exit_code: ClassVar[int] = 2

    def __init_subclass__(cls) -> None:
        cls.__module__ = PUBLIC

    def __init__(
        self, problem: str, where: str = "", hint: str = "", others: Sequence["UserError"] = ()
    ) -> None:
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

    @property
    def text(self) -> str:
        """Its own lines, without those of the errors it leads; of what is too long to be read, both ends."""
        at, do = f"\n  at: {self.where}" * bool(self.where), f"\n  do: {self.hint}" * bool(self.hint)
        return "\n".join(map(_readable, f"{self.problem}{at}{do}".split("\n")))

    def __str__(self) -> str:
        return "\n".join(finding.text for finding in self.findings)


UserError.__module__ = PUBLIC


def _readable(line: str) -> str:
    """A file may have a word of a million letters, which its message has too."""
    half = MOST_OF_LINE // 2
    return line if len(line) <= MOST_OF_LINE else f"{line[:half]} ... {line[-half:]}"


class ConfigError(UserError):
    """A file, a flag or an override that is not valid."""


class UnitError(ConfigError):
    """A quantity that cannot be read: what is wrong, and what to write instead."""


class ChipError(ConfigError):
    """A chip that is not in the catalog, or a figure of it that cannot be read."""


class ClusterError(ConfigError):
    """A cluster that cannot be."""


class CommsError(ClusterError):
    """A mistake in what is asked of the network."""


class TooManyMessages(CommsError):
    """A collective that is too large to be followed message by message."""


class PlanError(UserError):
    """A plan whose parts do not fit together."""


class OptimizerError(PlanError):
    """An optimizer that cannot step on flat shards."""


class PartitionError(PlanError):
    """A plan that the model cannot be cut by."""


class ProgramError(PartitionError):
    """A Program breaks a rule: text that does not parse, or communication that would hang."""


class SegmentError(ProgramError):
    """An operation of a segment that cannot be compiled: unknown operator or malformed code."""


class DataError(UserError):
    """Data that is missing, empty or too short."""


class ModelError(UserError):
    """A model that is unknown or cannot be built."""


class CaptureError(UserError):
    """The model cannot be captured as one graph."""


class FitError(UserError):
    """A plan that does not fit in memory."""

    exit_code: ClassVar[int] = 3


class RunError(UserError):
    """A run that ended before its last step."""

    exit_code: ClassVar[int] = 1


class TimelineFormatError(RunError):
    """The bytes are not a timeline."""


class DifferenceError(UserError):
    """A split run that is not the same training as one chip's."""

    exit_code: ClassVar[int] = 5


class HangError(UserError):
    """Chips that wait for each other, or that went silent."""

    exit_code: ClassVar[int] = 4


ErrorT = TypeVar("ErrorT", bound=UserError)


def combined(errors: Sequence[ErrorT]) -> ErrorT:
    """One error that leads all of `errors` (at least one), for a file that is wrong in several places."""
    first = errors[0]
    return type(first)(first.problem, first.where, first.hint, errors[1:])


@contextmanager
def located(where: str = "", hint: str = "", words: Mapping[str, str] | None = None) -> Iterator[None]:
    """An error that passes through gets the parts that it does not know; `words`: how users call its own places."""
    try:
        yield
    except UserError as error:
        own = (words or {}).get(error.where, error.where)
        error.where, error.hint = own or where, error.hint or hint
        raise


def method_line(kind: type, name: str) -> str:
    """Where a class defines a method, as `Kind.name (file:line)`; without a line where it is torch's, or Python's."""
    code = getattr(inspect.unwrap(getattr(kind, name, None) or (lambda: None)), "__code__", None)
    if (
        code is None
        or code.co_name != name
        or "-packages/torch/" in code.co_filename
        or code.co_filename[0] == "<"
    ):
        return f"{kind.__name__}.{name}"
    return f"{kind.__name__}.{name} ({code.co_filename}:{code.co_firstlineno})"


def first_sentence(error: Exception) -> str:
    """What a library says went wrong, in at most 200 characters and without its advice, which is for its own users."""
    return str(error).strip().partition("\n")[0].partition(". ")[0][:200]


def has_line(where: str) -> bool:
    """Whether a place names a line of a file."""
    return re.search(r":\d+\b", where) is not None
