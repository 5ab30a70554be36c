"""A model's own buffers: what was registered is written in place, so that all who hold it see what was trained.

What a forward of the user's has assigned since may be anybody's memory (a batch of theirs, a view): that is replaced.
"""

from collections.abc import Mapping

import torch
from torch import nn


class OwnBuffers:
    """The buffers that a model had at first, and those that took their place."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self._own = model, dict(model.named_buffers(remove_duplicate=False))

    def put(self, values: Mapping[str, torch.Tensor]) -> None:
        """Give buffers, by name, new values; those that were taken away since stay away."""
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        for name, value in values.items():
            if (now := buffers.get(name)) is None:
                continue
            own = self._own.setdefault(name, now)
            if now is not own or _repeats_itself(now):
                fresh = torch.empty_like(now, memory_format=torch.contiguous_format)
                names = [
                    n
                    for n, held in buffers.items()
                    if self._own.get(n) is own or (held is now and n not in values)
                ]
                for each in names:
                    path, _, key = each.rpartition(".")
                    self.model.get_submodule(path)._buffers[key] = self._own[each] = fresh
            self._own[name].copy_(value)


def _repeats_itself(value: torch.Tensor) -> bool:
    """Whether entries lie in one place, as those of an expanded tensor."""
    return any(n > 1 and not stride for n, stride in zip(value.shape, value.stride(), strict=True))
