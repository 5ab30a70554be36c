"""The process's random state: of torch (on the CPU), numpy and `random`, which users' code draws from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch

RandomState: TypeAlias = tuple[torch.Tensor, Any, Any]


@contextmanager
def random_state_restored() -> Iterator[None]:
    """After the block it is what it was before."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def random_state() -> RandomState:
    """What it is."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def set_random_state(state: RandomState) -> None:
    """Make it what `random_state` gave."""
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])
