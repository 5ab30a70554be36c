"""Model builder: from a model's name in a job to a module with its start values, on the CPU or as shapes only.

Contract of every module built here: it is called as `module(**batch)` and returns a scalar loss, or something
whose `.loss`, `["loss"]` or first element is one; unless the job brings its own loss. Language models take
`input_ids` and `labels`, both [batch, seq], where `labels[b, t]` is the token that position t must predict,
or -100 for none. This holds for Hugging Face models too: their shift of the labels is replaced by the loss of
builtin_gpt, which also keeps fp64 in fp64.

Same spec, arguments and seed give the same values in every dtype (drawn in fp32, then cast), and the global
random state is left as it was. Nothing is ever downloaded. Not modelled: pretrained weights.
"""

import dataclasses
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from comms.errors import ModelError, located
from orchestrator.models.builtin_gpt import TP_PLAN, build_gpt, next_token_loss
from orchestrator.models.model_specs import HF_CONFIGS, ModelSpec, SourceKind, gpt_options, parse_model

NUM_BYTES = 256  # the alphabet of a model that does not say how many tokens it knows
EXAMPLE_STRIDE = 7919  # a prime: example tokens walk over the whole vocabulary

# How Hugging Face names the cuts that we call colwise, rowwise and vocab; what is not here stays whole.
HF_STYLES: Mapping[str, str] = {
    "colwise": "colwise",
    "rowwise": "rowwise",
    "embedding_rowwise": "vocab",
    "colwise_gather_output": "vocab",
}
# GPT-2 comes without a plan. Its attention holds query, key and value in one weight, each to be cut by heads.
GPT2_PLAN: Mapping[str, str] = {
    "transformer.wte": "vocab",
    "transformer.h.*.attn.c_attn": "fused_qkv",
    "transformer.h.*.attn.c_proj": "rowwise",
    "transformer.h.*.mlp.c_fc": "colwise",
    "transformer.h.*.mlp.c_proj": "rowwise",
    "lm_head": "vocab",
}


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
    example: Callable[[int, int], Mapping[str, Tensor]] | None = None  # the module's own example batches

    def example_batch(self, batch: int, seq: int) -> dict[str, Tensor]:
        """Inputs of the right shapes and types on the module's device; language models get ids in range."""
        if self.max_seq is not None and seq > self.max_seq:
            problem = f"seq {seq} is longer than the {self.max_seq} positions of {self.name}"
            raise ModelError(problem, where="seq", hint="lower seq, or give the model more positions")
        if self.example is not None:
            return {name: self._placed(tensor) for name, tensor in self.example(batch, seq).items()}
        vocab = self.vocab_size or NUM_BYTES
        walk = torch.arange(batch * (seq + 1), device=self.device) * EXAMPLE_STRIDE % vocab
        tokens = walk.view(batch, seq + 1)
        return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)


def build(name: str, args: Mapping[str, object], *, device: str, dtype: torch.dtype, seed: int) -> BuiltModel:
    """The model of that name with `args`, initialised from `seed`; raises ModelError when it cannot be built.

    On "meta" tensors have shapes but no data: 175 billion parameters take about a second.
    """
    spec = parse_model(name)
    builders = {
        SourceKind.BUILTIN: _build_builtin,
        SourceKind.HF: _build_hf,
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
    spec: ModelSpec, args: Mapping[str, object], device: str, dtype: torch.dtype, seed: int
) -> BuiltModel:
    transformers = _import_transformers()
    config = _hf_config(transformers, spec, args)
    with _seeded(device, seed):
        try:
            module = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", dtype=torch.float32
            )
        except (ValueError, TypeError, ImportError) as error:
            hint = "give the configuration of a causal language model with sdpa attention"
            raise ModelError(_one_line(error), hint=hint) from error
    module.loss_function = lambda logits, labels, **_: next_token_loss(logits, labels)
    _cast_state(module, dtype)
    max_seq = getattr(config, "max_position_embeddings", None)
    vocab = getattr(config, "vocab_size", None)
    return BuiltModel(str(spec), module, device, dtype, vocab, max_seq, _hf_plan(module, config.model_type))


def _build_from_factory(
    spec: ModelSpec, args: Mapping[str, object], device: str, dtype: torch.dtype, seed: int
) -> BuiltModel:
    factory = _find_factory(spec)
    with _seeded(device, seed):
        try:
            module = factory(**args)
        except TypeError as error:
            hint = "model_args are the factory's keyword arguments"
            raise ModelError(_one_line(error), hint=hint) from error
    if not isinstance(module, nn.Module):
        problem = f"the factory returned {type(module).__name__}"
        raise ModelError(problem, hint="return a torch.nn.Module")
    return BuiltModel(
        name=str(spec),
        module=module.to(dtype),
        device=device,
        dtype=dtype,
        vocab_size=_int_attribute(module, "vocab_size"),
        max_seq=_int_attribute(module, "max_seq"),
        tp_plan=dict(getattr(module, "tp_plan", None) or {}),
        example=getattr(module, "example_batch", None),
    )


@contextmanager
def _seeded(device: str, seed: int) -> Iterator[None]:
    """New tensors lie on `device` and random numbers come from `seed`; afterwards nothing has changed."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed % 2**64)
        yield


def _import_transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        problem = "hf: models need the transformers package"
        hint = "pip install 'orchestrate-chips[hf]'"
        raise ModelError(problem=problem, where="model", hint=hint) from error


def _hf_config(transformers: Any, spec: ModelSpec, args: Mapping[str, object]) -> Any:
    values = {**_hf_values(spec), **args, "use_cache": False}
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        problem = f"model_type {model_type!r} is not one that transformers {transformers.__version__} knows"
        raise ModelError(problem, hint="use the config.json of a released model")
    config_class = transformers.CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    for name in args:
        # Configurations take any keyword and ignore what they do not know: a typo must not pass.
        if name not in known and name not in config_class.attribute_map:
            hint = f"use an attribute of {config_class.__name__}"
            raise ModelError(f"unknown option {name!r}", where=f"model_args of {spec}", hint=hint)
    invalid = importlib.import_module("huggingface_hub.errors").StrictDataclassError
    try:
        return config_class(**values)
    except (invalid, ValueError, TypeError) as error:
        raise ModelError(_one_line(error), hint="mend the configuration") from error


def _hf_values(spec: ModelSpec) -> dict[str, object]:
    if spec.target in HF_CONFIGS:
        return dict(HF_CONFIGS[spec.target])
    with located("model", "give the path of a config.json"):
        try:
            values = json.loads(Path(spec.target).read_text())
        except OSError as error:
            raise ModelError(f"cannot read {spec.target}: {error.strerror}") from error
        except ValueError as error:
            raise ModelError(f"{spec.target} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ModelError(f"{spec.target} does not hold a JSON object")
    return values


def _hf_plan(module: Any, model_type: str) -> dict[str, str]:
    if model_type == "gpt2":
        return dict(GPT2_PLAN)
    plan = module.tp_plan or {}
    return {pattern: HF_STYLES[style] for pattern, style in plan.items() if style in HF_STYLES}


def _cast_state(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and saved buffers in `dtype`; derived buffers (rotary frequencies) keep their precision."""
    for tensor in module.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _find_factory(spec: ModelSpec) -> Callable[..., object]:
    assert spec.factory is not None
    module = _load_file(spec) if spec.kind is SourceKind.FILE else _load_module(spec)
    factory = getattr(module, spec.factory, None)
    if not callable(factory):
        problem = f"{spec.target} has no function {spec.factory!r}"
        raise ModelError(problem, hint="name a function that returns a module")
    found: Callable[..., object] = factory
    return found


def _load_file(spec: ModelSpec) -> ModuleType:
    path = Path(spec.target)
    if not path.is_file():
        raise ModelError(f"no file {spec.target}", where="model", hint="give a Python file's path")
    found = importlib.util.spec_from_file_location(f"orchestrate_model_{path.stem}", path)
    assert found is not None and found.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses and pickling look their module up by name
    try:
        found.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        hint = "make the file importable on its own"
        problem = f"{type(error).__name__}: {_one_line(error)}"
        raise ModelError(problem=problem, where=spec.target, hint=hint) from error
    return module


def _load_module(spec: ModelSpec) -> ModuleType:
    try:
        return importlib.import_module(spec.target)
    except ModuleNotFoundError as error:
        if error.name is None or not spec.target.startswith(error.name):
            raise
        hint = "install the package, or give the path of a .py file"
        raise ModelError(f"no module {spec.target!r}", hint=hint) from error


def _int_attribute(module: nn.Module, name: str) -> int | None:
    value = getattr(module, name, None)
    return value if isinstance(value, int) else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
