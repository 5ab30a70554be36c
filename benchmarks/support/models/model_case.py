"""A model case: a name, what builds the model from nothing but its configuration, and what makes a batch of it.

Every model is called as `model(**batch)` and returns something with a `.loss`. All sizes are tiny, and all
numbers float64 where the model's own code can compute with them (grouped products of experts cannot, nor can XGLM).
Labels leave out another number of places in each sample, so that the parts of a batch do not weigh the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

VOCAB, SEQ, CLASSES, SIDE, CHANNELS = 96, 8, 3, 32, 3
IGNORED = -100
PRECISION, EXPERTS = (
    "its precision",
    "how experts are computed",
)  # among a configuration's values, but not of it
SINGLE: Mapping[str, Any] = {PRECISION: torch.float32}
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_labels": CLASSES,
}  # fmt: skip
PICTURES: Mapping[str, Any] = {"image_size": SIDE, "num_labels": CLASSES}
VISION: Mapping[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": 8, "num_labels": CLASSES,
}  # fmt: skip
Batch: TypeAlias = dict[str, Any]
MakeBatch: TypeAlias = Callable[[int], Batch]
Row: TypeAlias = tuple[
    str, str, Mapping[str, Any]
]  # name, class of transformers, what differs from the sizes


@dataclass(frozen=True, slots=True)
class ModelCase:
    """`make()` gives a new module with the same start values every time, `batch(n)` the same n samples."""

    name: str
    kind: str
    make: Callable[[], nn.Module]
    batch: MakeBatch


def hf_cases(kind: str, rows: Sequence[Row], sizes: Mapping[str, Any], batch: MakeBatch) -> list[ModelCase]:
    """Cases of transformers' models that take the same batches."""
    return [
        ModelCase(name, kind, partial(hf_model, cls, {**sizes, **more}), batch) for name, cls, more in rows
    ]


def hf_model(name: str, values: Mapping[str, Any]) -> nn.Module:
    """A model of transformers with drawn start values, in train mode."""
    import transformers

    kind = getattr(transformers, name)
    config = kind.config_class(**{k: v for k, v in values.items() if k not in (PRECISION, EXPERTS)})
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if EXPERTS in values:
        config._experts_implementation = values[EXPERTS]
    return drawn(lambda: kind(config), values.get(PRECISION, torch.float64))


def own_case(
    name: str,
    kind: str,
    make: Callable[[], nn.Module],
    batch: MakeBatch,
    loss: Callable[..., Tensor] | None = None,
) -> ModelCase:
    """A case of a network that returns its output (`loss`: of output and labels) or its loss."""
    return ModelCase(name, kind, lambda: drawn(lambda: WithLoss(make(), loss)), batch)


def drawn(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """The module in train mode, its start values drawn from seed 0."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return make().to(dtype).train()


class WithLoss(nn.Module):
    """Gives a network an output with a loss."""

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> SimpleNamespace:
        """The network's own loss, or that of its output."""
        out = self.net(**inputs)
        return SimpleNamespace(loss=out if self.loss is None else self.loss(out, labels))


def generator(number: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(number)


def tokens(n: int, seq: int = SEQ, number: int = 0) -> Tensor:
    """Whole numbers without the special ones."""
    return torch.randint(3, VOCAB, (n, seq), generator=generator(number))


def numbers(*shape: int, number: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=generator(number), dtype=torch.float64)


def classes(n: int, *shape: int, count: int = CLASSES) -> Tensor:
    """Labels of `count` classes."""
    return torch.randint(0, count, (n, *shape), generator=generator(7))


def some(labels: Tensor) -> Tensor:
    """Labels of which each sample leaves out one more at its end than the sample before."""
    places = torch.arange(labels.shape[1])
    kept = labels.shape[1] - torch.arange(labels.shape[0]) % (labels.shape[1] - 2)
    return labels.masked_fill(places[None] >= kept[:, None], IGNORED)


def language(n: int) -> Batch:
    """Tokens, all of them seen, and labels of some."""
    ids = tokens(n)
    return {"input_ids": ids, "labels": some(ids)}


def masked_language(n: int) -> Batch:
    """Tokens with padding, and labels of some."""
    mask = (some(tokens(n)) != IGNORED).long()
    return {"input_ids": tokens(n) * mask, "attention_mask": mask, "labels": some(tokens(n, number=1))}


def sequence_classes(n: int) -> Batch:
    """Tokens with padding, and a class of each sample."""
    batch = masked_language(n)
    return batch | {"labels": classes(n)}


def token_classes(n: int) -> Batch:
    """Tokens with padding, and a class of some tokens."""
    return masked_language(n) | {"labels": some(classes(n, SEQ))}


def answers(n: int) -> Batch:
    """Tokens, and where an answer starts and ends."""
    start = torch.arange(n) % 3
    return {"input_ids": tokens(n), "start_positions": start, "end_positions": start + 2}


def pairs(n: int) -> Batch:
    """Tokens of a source, and labels of another length."""
    mask = (some(tokens(n)) != IGNORED).long()
    return {"input_ids": tokens(n) * mask, "attention_mask": mask, "labels": some(tokens(n, SEQ - 2, 1))}


def images(n: int) -> Batch:
    """Images, and a class of each."""
    return {"pixel_values": numbers(n, CHANNELS, SIDE, SIDE), "labels": classes(n)}
