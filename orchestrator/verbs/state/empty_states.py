"""Empty states: while chips have an optimizer's states, those that are not here yet are held empty.

Whoever clears the optimizer's states or loads others then is seen, as where they were here.
"""

import torch
from torch import nn


class EmptyStates:
    """Of the parameters that an optimizer has no state of."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._held: dict[str, nn.Parameter] = {}

    def set(self, model: nn.Module, *, is_held: bool) -> None:
        """Hold them empty, or take away those that have stayed so."""
        state = self.optimizer.state
        for param in self._held.values():
            if state.get(param) == {}:
                del state[param]
        missing = {name: param for name, param in model.named_parameters() if param not in state}
        self._held = missing if is_held else {}
        state.update({param: {} for param in self._held.values()})

    def lost(self) -> list[str]:
        """Parameters whose states were taken away meanwhile."""
        return [name for name, param in self._held.items() if param not in self.optimizer.state]
