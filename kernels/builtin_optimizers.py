"""Built-in optimizers: those that jobs know by name, as a table, so that a job is checked and planned without torch."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BuiltInOptimizer:
    """A class of `torch.optim`, the fields of OptimizerSpec that it takes, and the states it keeps per parameter."""

    torch_name: str
    settings: tuple[str, ...]
    kernel: str  # the argument that asks for torch's fastest implementation on flat tensors
    states: int
    states_without_momentum: int


BUILT_IN: Mapping[str, BuiltInOptimizer] = {
    "adamw": BuiltInOptimizer("AdamW", ("lr", "betas", "eps", "weight_decay"), "fused", 2, 2),
    "sgd": BuiltInOptimizer("SGD", ("lr", "momentum", "weight_decay"), "foreach", 1, 0),
}
