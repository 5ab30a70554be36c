"""Optimizers on flat shards: real `torch.optim` classes stepping on one 1-D tensor per flat group.

AdamW uses torch's fused kernel, SGD its foreach one; any other class comes from a factory
`factory(params) -> torch.optim.Optimizer`. Only elementwise optimizers are right on flat shards: `require_elementwise`
compares a step on a matrix with a step on its flattened copy and refuses the others (Shampoo, Muon, Adafactor).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from comms.errors import OptimizerError
from kernels.builtin_optimizers import BUILT_IN

Factory: TypeAlias = Callable[[Sequence[torch.Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """A built-in optimizer (see `builtin_optimizers`) and its settings; each takes those that it has."""

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.0

    def __call__(self, params: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        """Build the optimizer over `params`."""
        known = BUILT_IN[self.name]
        settings = {name: getattr(self, name) for name in known.settings}
        made: torch.optim.Optimizer = getattr(torch.optim, known.torch_name)(
            params, **settings, **{known.kernel: True}
        )
        return made


def states_per_element(factory: Factory) -> int:
    """How many full-size state tensors the optimizer keeps (2 for AdamW), found by taking one step."""
    param = torch.ones(6, requires_grad=True)
    optimizer = factory([param])
    param.grad = torch.ones(6)
    optimizer.step()
    return sum(isinstance(v, torch.Tensor) and v.numel() == 6 for v in optimizer.state[param].values())


def require_elementwise(factory: Factory) -> None:
    """Raise OptimizerError unless a step on a 4x6 matrix equals the step on its 24 numbers."""
    generator = torch.Generator().manual_seed(0)
    start, grads = torch.randn(4, 6, generator=generator), torch.randn(2, 4, 6, generator=generator)
    results = []
    for shape in ((4, 6), (24,)):
        param = start.clone().reshape(shape).requires_grad_()
        try:
            optimizer = factory([param])
            for grad in grads:
                param.grad = grad.clone().reshape(shape)
                optimizer.step()
        except Exception as error:  # whatever the user's code raises
            raise OptimizerError(f"the optimizer cannot step on a flat tensor: {error}") from error
        results.append(param.detach().reshape(24))
    if not torch.allclose(results[0], results[1], rtol=1e-6, atol=1e-7):
        raise OptimizerError(f"{type(optimizer).__name__} depends on the shape of its parameters")


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """The reduced statistics of a step: gradients are of loss_sum / nominal_count until scaled."""

    squares: float
    loss_sum: float
    count: float
    nominal_count: float

    @property
    def loss(self) -> float:
        """Mean loss over what was counted; NaN if nothing was."""
        return self.loss_sum / self.count if self.count else math.nan

    @property
    def grad_norm(self) -> float:
        """L2 norm of the gradient of the mean loss."""
        return math.sqrt(self.squares) * self.correction if self.squares >= 0 else math.nan

    @property
    def correction(self) -> float:
        """What makes accumulated gradients those of the mean loss: nominal over actual count."""
        return self.nominal_count / self.count if self.count else math.nan

    @property
    def is_finite(self) -> bool:
        """False: the step is skipped."""
        return math.isfinite(self.squares) and math.isfinite(self.loss_sum) and self.count > 0

    def gradient_scale(self, clip_norm: float | None) -> float:
        """What to multiply gradients by: nominal / actual count, and clipping as torch.nn.utils.clip_grad_norm_."""
        if clip_norm is None:
            return self.correction
        return self.correction * min(1.0, clip_norm / (self.grad_norm + 1e-6))


class FlatOptimizer:
    """One optimizer over one flat tensor."""

    def __init__(self, factory: Factory, flat: torch.Tensor, *, decay: bool) -> None:
        self.param = torch.nn.Parameter(flat, requires_grad=True)
        self.optimizer = factory([self.param])
        if not decay:
            for group in self.optimizer.param_groups:
                if "weight_decay" in group:
                    group["weight_decay"] = 0.0

    def step(self, grad: torch.Tensor, scale: float, lr: float) -> None:
        """Scale `grad` in place and step with learning rate `lr`."""
        grad.mul_(scale)
        self.param.grad = grad
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.param.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """State tensors by name (numbers as 0-dim tensors), for a checkpoint."""
        found = self.optimizer.state.get(self.param, {})
        return {k: v if isinstance(v, torch.Tensor) else torch.tensor(v) for k, v in found.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state` gave, bit for bit."""
        self.optimizer.state[self.param] = {k: v.clone() for k, v in state.items()}
