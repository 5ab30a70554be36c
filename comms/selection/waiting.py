"""Waiting: what those who wait for a long computation are told, in phases that may nest (`Console.phase`)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeAlias

from comms.simulation.work_budget import Watch

Phase: TypeAlias = Callable[[str], AbstractContextManager[None]]


def quiet(name: str) -> AbstractContextManager[None]:
    """A phase that nobody watches."""
    del name
    return nullcontext()


@contextmanager
def moving(algorithm: str, phase: Phase) -> Iterator[Watch]:
    """A phase while the messages of an algorithm are moved, with a phase inside for each look at how far they are."""
    with phase(f"every message of {algorithm}"), ExitStack() as inner:

        def moved(share: float) -> None:
            inner.close()
            inner.enter_context(phase(f"{share:.0%} of the messages have been moved"))

        yield moved
