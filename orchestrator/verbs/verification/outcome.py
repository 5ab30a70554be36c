"""Outcome: what a step of a training run left, whoever took it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from kernels.optimizers import AS

Tensors: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step left: its loss, the gradients that were stepped on; parameters, buffers and states after it.

    `copies`: what further chips of a plan hold otherwise, by chip or replica.
    """

    loss: float
    gradients: Tensors
    values: Tensors
    states: Tensors = field(default_factory=dict)  # of the optimizer, as `named_states`
    copies: Mapping[str, "Outcome"] = field(default_factory=dict)


def named_states(states: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """States of the optimizer, such as "exp_avg of w"; numbers as tensors in float64."""
    found: dict[str, torch.Tensor] = {}
    for name, own in states.items():
        for key, value in own.items():
            has_dims = isinstance(value, torch.Tensor) and value.dim()
            if value is not None:
                made = value if has_dims else torch.tensor(float(value), dtype=torch.float64)
                found[f"{key.partition(AS)[0]} of {name}"] = made
    return found
