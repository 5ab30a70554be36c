"""A model's own buffers: written in place, unless a forward of the user's left memory of others (a batch) in them."""

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
        for name in (name for name in values if name in buffers):
            now, own = buffers[name], self._own.setdefault(name, buffers[name])
            if now is not own or 0 in now.stride():  # entries in one place, as of an expanded one
                fresh = torch.empty_like(now, memory_format=torch.contiguous_format)
                for each, held in buffers.items():
                    if self._own.get(each) is own or (held is now and each not in values):
                        path, _, key = each.rpartition(".")
                        self.model.get_submodule(path)._buffers[key] = self._own[each] = fresh
            self._own[name].copy_(values[name])
