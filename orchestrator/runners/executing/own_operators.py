"""Operators of the user's (`torch.library`): what they do besides is not in a graph, so their draws are looked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy
import torch

from comms.errors import RunError
from partitioner.program.program import Program

KNOWN = frozenset({"aten", "prims", "orchestrate"})  # namespaces


def own_operators(program: Program) -> list[str]:
    """Those of other namespaces than torch's and ours, in the order of the Program."""
    targets = (op.target for segment in program.segments for op in segment.ops)
    return list(dict.fromkeys(t for t in targets if "." in t and t.partition(".")[0] not in KNOWN))


@contextmanager
def drawing_nothing(operators: list[str]) -> Iterator[None]:
    """Raises RunError if the block, which runs these operators, drew from a generator of torch or numpy."""
    before = _states() if operators else ()
    yield
    if operators and _states() != before:
        problem = f"{' or '.join(operators)} draws random numbers that no key decides"
        raise RunError(problem, operators[0], "draw in the forward, and pass what is drawn to the operator")


def require_no_state(operators: list[str], is_as_before: Callable[[], bool]) -> None:
    """Raises RunError if a step changed what operators or the model read: each chip and microbatch runs them."""
    if operators and not is_as_before():
        problem = (
            f"{' or '.join(operators)} changes what its code or the model's reads, as often as chips run it"
        )
        raise RunError(problem, operators[0], "let it compute from its operands alone")


def _states() -> tuple[object, ...]:
    _, words, *places = numpy.random.get_state(legacy=True)
    return torch.get_rng_state().numpy().tobytes(), numpy.asarray(words).tobytes(), *places
