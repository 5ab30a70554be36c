"""Model builder: from a model's name in a job to a module with its start values, on the CPU or as shapes only.

Contract of every module built here: it is called as `module(**batch)` and returns a scalar loss, or something
whose `.loss`, `["loss"]` or first element is one; unless the job brings its own loss. Language models take
`input_ids` and `labels`, both [batch, seq], where `labels[b, t]` is the token that position t must predict,
or -100 for none. This holds for causal Hugging Face models too, unless they are fed the user's own batches
(`hf_models`).

Same spec, arguments and seed give the same values in every dtype (drawn in fp32, then cast), and the global
random state is left as it was. Nothing is ever downloaded.
"""

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from comms.errors import ModelError, located
from orchestrator.models.builtin_gpt import TP_PLAN, build_gpt
from orchestrator.models.hf_models import build_hf, walk
from orchestrator.models.model_specs import ModelSpec, SourceKind, gpt_options, parse_model
from orchestrator.models.random_state import random_state_restored
from orchestrator.models.user_code import called, named_object

NUM_BYTES = 256  # the alphabet of a model that does not say how many tokens it knows


@dataclasses.dataclass(frozen=True, slots=True)
class BuiltModel:
    """A module and what the rest needs to know to feed and cut it."""

    name: str
    module: nn.Module
    device: str  # "cpu" or "meta"
    dtype: torch.dtype  # of its parameters, and of inputs that are no whole numbers
    vocab_size: int | None  # None: not a language model, or it does not say
    max_seq: int | None  # None: any length
    tp_plan: Mapping[str, str]  # module name pattern -> colwise | rowwise | vocab | fused_qkv; may be empty
    example: Callable[[int, int], Mapping[str, Any]] | None = None  # the module's own example batches
    said: tuple[str, ...] = ()  # of its weights, to be told
    takes_text: bool = True  # as `input_ids`, and `labels` that are the next token of each

    def example_batch(self, batch: int, seq: int) -> dict[str, Any]:
        """Inputs of the right shapes and types on the module's device; language models get ids in range."""
        if self.max_seq is not None and seq > self.max_seq:
            problem = f"seq {seq} is longer than the {self.max_seq} positions of {self.name}"
            raise ModelError(problem, where="seq", hint="lower seq, or give the model more positions")
        if self.example is not None:
            return {name: self._placed(value) for name, value in self.example(batch, seq).items()}
        tokens = walk((batch, seq + 1), self.vocab_size or NUM_BYTES, self.device)
        return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)


def build(
    name: str, args: Mapping[str, object], *, device: str, dtype: torch.dtype, seed: int, shifted: bool = True
) -> BuiltModel:
    """The model of that name with `args`, initialised from `seed`; raises ModelError when it cannot be built.

    On "meta" tensors have shapes but no data: 175 billion parameters take about a second. `shifted`: the labels that a
    causal model of transformers is given are the next tokens already.
    """
    spec = parse_model(name)
    builders: Mapping[SourceKind, Callable[..., BuiltModel]] = {
        SourceKind.BUILTIN: _build_builtin,
        SourceKind.HF: partial(_build_hf, shifted=shifted),
        SourceKind.FILE: _build_from_factory,
        SourceKind.MODULE: _build_from_factory,
    }
    with located(str(spec)):
        return builders[spec.kind](spec, args, device, dtype, seed)


def _build_builtin(
    spec: ModelSpec, args: Mapping[str, object], device: str, dtype: torch.dtype, seed: int
) -> BuiltModel:
    options = gpt_options(spec.target, args)
    module = build_gpt(options, device=torch.device(device), dtype=dtype, seed=seed)
    max_seq = None if options.rotary else options.max_seq
    return BuiltModel(str(spec), module, device, dtype, options.vocab, max_seq, TP_PLAN)


def _build_hf(
    spec: ModelSpec, args: Mapping[str, object], device: str, dtype: torch.dtype, seed: int, *, shifted: bool
) -> BuiltModel:
    with _seeded(device, seed):
        made = build_hf(spec, args, device, dtype, shifted=shifted)
    takes_text = made.head == "causal" and shifted
    return BuiltModel(str(spec), made.module, device, dtype, made.vocab_size, made.max_seq, made.tp_plan,
                      made.example, made.said, takes_text)  # fmt: skip


def _build_from_factory(
    spec: ModelSpec, args: Mapping[str, object], device: str, dtype: torch.dtype, seed: int
) -> BuiltModel:
    name = str(spec)
    factory = named_object(name, "model")
    if isinstance(factory, nn.Module):
        module: object = factory
    elif callable(factory):
        with _seeded(device, seed):
            module = called(factory, name, "model", **args)
    else:
        module = factory
    if not isinstance(module, nn.Module):
        problem = f"{name} is" if module is factory else f"{name} returned"
        raise ModelError(
            f"{problem} a {type(module).__name__}",
            "model",
            "give a torch.nn.Module, or a function that returns one",
        )
    if module is factory and args:
        raise ModelError(
            f"{name} is a module, which takes no model_args", "model", "name a function that makes it"
        )
    module = copy.deepcopy(module) if module is factory else module
    if any(is_lazy(value) for value in (*module.parameters(), *module.buffers())):
        problem = f"{name} gives a module with parameters that have no shape before its first forward"
        raise ModelError(problem, "model", "call it once on a batch before it is returned")
    own = _attribute(module, "example_batch")
    vocab, longest = (_int_attribute(module, n) for n in ("vocab_size", "max_seq"))
    return BuiltModel(name, module.to(dtype), device, dtype, vocab, longest, {}, own)


@contextmanager
def _seeded(device: str, seed: int) -> Iterator[None]:
    """New tensors lie on `device` and random numbers come from `seed`; afterwards nothing has changed."""
    with random_state_restored(), torch.device(device):
        torch.manual_seed(seed % 2**64)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


def _int_attribute(module: nn.Module, name: str) -> int | None:
    value = _attribute(module, name)
    return value if isinstance(value, int) else None


def _attribute(module: nn.Module, name: str) -> Any:
    try:
        return getattr(module, name, None)
    except Exception:  # the module's own way to find attributes need not know ours
        return None
