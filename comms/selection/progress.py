"""Progress: how those who wait for a long computation hear of it, in phases that may nest (`Console.phase`)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeAlias

from comms.simulation.work_budget import Watch

Progress: TypeAlias = Callable[[str], AbstractContextManager[None]]  # opens a phase of that name
LOADING = "event loop of full fidelity (compiled on first use, then kept)"


def quiet(name: str) -> AbstractContextManager[None]:
    """A phase that nobody watches."""
    del name
    return nullcontext()


@contextmanager
def moving(algorithm: str, progress: Progress) -> Iterator[Watch]:
    """A phase while the messages of an algorithm are moved, with a phase inside for each look at how far they are."""
    with progress(f"every message of {algorithm}"), ExitStack() as inner:

        def moved(share: float) -> None:
            inner.close()
            inner.enter_context(progress(f"{share:.0%} of the messages have been moved"))

        yield moved
