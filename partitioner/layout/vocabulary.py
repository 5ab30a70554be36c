"""Tables whose rows are cut along tp: lookups, and cross entropy over logits whose classes are cut.

- an embedding with the vocabulary cut (Shoeybi et al. 2019, section 3),
- cross entropy over vocabulary-cut logits: three small all-reduces instead of gathering the logits.

Where a vocabulary does not divide, the last chip's rows are padded; the logits of those count for nothing.
"""

from collections.abc import Mapping
from typing import Any

import torch

from partitioner.layout.cut_rules import CutCall, Rule
from partitioner.layout.cut_values import CutTensor, all_reduce, is_any_cut

NO_PADDING = -1
SUM = 2  # torch's code of the reduction
IGNORED = -100


def embedding(call: CutCall) -> Any:
    """Rows of a cut table: [.., hidden], zero where another chip holds the row, then summed; or slices of rows.

    The row of `padding_idx` gets no gradient, as in `torch.nn.Embedding`. Indices of no row are errors, as there.
    """
    weight, ids = call.args[:2]
    padding = call.get(2, "padding_idx", NO_PADDING)
    if not isinstance(weight, CutTensor) or isinstance(ids, CutTensor) or call.get(3, "scale_grad_by_freq"):
        return None
    if weight.dim == 1:
        return CutTensor(call.on_local(*call.args[1:]), ids.dim(), weight.sections)
    if len(weight.sections) > 1:
        return None
    local = weight.local
    index, held = _own_places(ids, call.group.coordinate, local.shape[0], weight.sections[0])
    rows = torch.nn.functional.embedding(index, local)
    rows = rows * held.unsqueeze(-1).to(rows.dtype)
    if padding != NO_PADDING:
        rows = torch.where((ids == padding).unsqueeze(-1), rows.detach(), rows)
    return call.group.total(rows)


def embedding_bag(call: CutCall) -> Any:
    """Bags of rows whose entries are cut."""
    weight, rest = call.x, call.args[1:]
    if not isinstance(weight, CutTensor) or weight.dim != 1 or is_any_cut(rest):
        return None
    own = [call.group.entered(a) if isinstance(a, torch.Tensor) and a.requires_grad else a for a in rest]
    made, *others = call.on_local(*own)
    return (CutTensor(made, 1, weight.sections), *others)


def cross_entropy(call: CutCall) -> Any:
    """The unweighted sum of token losses for [tokens, classes] logits, cut along classes; targets are whole."""
    logits, target = call.x, call.group.whole(call.args[1])
    weight, smoothing = call.get(2, "weight"), call.get(5, "label_smoothing", 0.0)
    is_plain = weight is None and call.get(3, "reduction", 1) == SUM and smoothing == 0.0
    if (
        not isinstance(logits, CutTensor)
        or not is_plain
        or target.is_floating_point()
        or len(logits.sections) > 1
    ):
        return None
    if logits.dim != len(logits.shape) - 1 or len(logits.shape) > 2:
        return None
    ignore = call.get(4, "ignore_index", IGNORED)
    (classes,) = logits.sections
    is_padded = not call.group.is_even(logits.sections)
    # as exactly as torch, which rounds to a narrow dtype only the result
    local = logits.local.to(torch.promote_types(logits.local.dtype, torch.float32))
    return _VocabCrossEntropy.apply(local, target, call.group.coordinate, ignore, classes, is_padded)


def _own_places(
    index: torch.Tensor, coordinate: torch.Tensor, length: int, total: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where entries of a cut dim are on this chip, and whether they are here; -1, an error, for what is nowhere."""
    own = index - coordinate * length
    is_held, exists = (own >= 0) & (own < length), (index >= 0) & (index < total)
    return torch.where(is_held & exists, own, torch.where(exists, 0, -1)), is_held


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        coordinate: torch.Tensor,
        ignore: int,
        classes: int,
        is_padded: bool,
    ) -> torch.Tensor:
        width = logits.shape[-1]
        if is_padded:  # columns beyond the last class
            column = torch.arange(width, device=logits.device) + coordinate * width
            logits = torch.where(column < classes, logits, -torch.inf)
        shifted = logits - all_reduce(logits.amax(-1), "max").unsqueeze(-1)
        exponentials = shifted.exp()
        is_counted = target != ignore
        index, held = _own_places(torch.where(is_counted, target, 0), coordinate, width, classes)
        index, held = index.unsqueeze(-1), held & is_counted
        picked = torch.where(held, shifted.gather(-1, index).squeeze(-1), 0.0)
        sums = all_reduce(torch.stack([exponentials.sum(-1), picked]), "sum")
        counted = is_counted.to(logits.dtype)
        ctx.save_for_backward(exponentials / sums[0].unsqueeze(-1), index, held, counted)
        return ((sums[0].log() - sums[1]) * counted).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        softmax, index, held, counted = ctx.saved_tensors
        grad = softmax.scatter_add(-1, index, -held.to(softmax.dtype).unsqueeze(-1))
        return grad * (counted * grads[0]).unsqueeze(-1), None, None, None, None, None


VOCABULARY_RULES: Mapping[str, Rule] = {
    "embedding": embedding, "embedding_bag": embedding_bag, "_embedding_bag": embedding_bag,
    "cross_entropy_loss": cross_entropy,
}  # fmt: skip
