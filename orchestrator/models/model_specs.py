"""Model specs: what a model name in a job means, before any tensor exists.

`builtin:gpt-SIZE` names a row of GPT_PRESETS, `hf:NAME` a model of transformers (`hf_models` says which names), a
folder with a config.json one with weights, `PATH.py:FACTORY` and `PACKAGE.MODULE:FACTORY` a function that returns a
module. Torch-free, so that a
job file can be checked without loading a framework; `model_builder` builds what is described here.

Sizes `small` to `175b` follow Brown et al., "Language Models are Few-Shot Learners" (2020), table 2.1, with
the vocabulary padded to a multiple of 128; 13b uses width 5120 (its heads of 128 do not divide the printed
5140), and 30b and 66b are the sizes of Zhang et al., "OPT" (2022), table 1, as that table has no GPT-3 of
those sizes. Not modelled: tokenizers.
"""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from comms.errors import ModelError, located


class SourceKind(StrEnum):
    """Where a model comes from."""

    BUILTIN = "builtin"
    HF = "hf"
    FILE = "file"
    MODULE = "module"


class Norm(StrEnum):
    """Normalisation before attention, before the MLP and before the head."""

    LAYER = "layer"
    RMS = "rms"


class Activation(StrEnum):
    """Non-linearity of the MLP; swiglu adds a gate projection."""

    GELU = "gelu"
    SWIGLU = "swiglu"
    RELU = "relu"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A parsed model name: a preset, configuration, folder, file or module, and its function or head."""

    kind: SourceKind
    target: str
    factory: str | None = None

    def __str__(self) -> str:
        named = f"{self.target}:{self.factory}" if self.factory else self.target
        return f"{self.kind}:{named}" if self.kind in (SourceKind.BUILTIN, SourceKind.HF) else named


MOST_LAYERS, MOST_COLUMNS = 10_000, 2**26  # far beyond any model


@dataclass(frozen=True, slots=True)
class GPTOptions:
    """Everything that shapes a built-in GPT; the keyword arguments of `builtin:gpt-*` are these fields."""

    layers: int
    width: int
    heads: int
    kv_heads: int | None = None  # None: as many as heads
    mlp_width: int | None = None  # None: 4 x width, or for swiglu 8/3 x width rounded up to 64
    vocab: int = 256
    max_seq: int = 1024
    norm: Norm = Norm.LAYER
    rotary: bool = False
    activation: Activation = Activation.GELU
    tied: bool = False
    bias: bool = True

    @property
    def head_width(self) -> int:
        """Columns of one attention head."""
        return self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads; fewer than `heads` when grouped."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden_width(self) -> int:
        """Columns of the MLP's inner layer."""
        if self.mlp_width is not None:
            return self.mlp_width
        if self.activation is Activation.SWIGLU:
            return -(-8 * self.width // (3 * 64)) * 64
        return 4 * self.width


def _gpt3(layers: int, width: int, heads: int) -> GPTOptions:
    return GPTOptions(layers, width, heads, vocab=50304, max_seq=2048, tied=True)


GPT_PRESETS: Mapping[str, GPTOptions] = types.MappingProxyType(
    {
        "gpt-nano": GPTOptions(2, 64, 4, max_seq=256),
        "gpt-mini": GPTOptions(
            4, 128, 4, norm=Norm.RMS, rotary=True, activation=Activation.SWIGLU, bias=False
        ),
        "gpt-10m": GPTOptions(6, 384, 6),
        "gpt-small": _gpt3(12, 768, 12),
        "gpt-medium": _gpt3(24, 1024, 16),
        "gpt-large": _gpt3(24, 1536, 16),
        "gpt-1.3b": _gpt3(24, 2048, 16),
        "gpt-2.7b": _gpt3(32, 2560, 32),
        "gpt-6.7b": _gpt3(32, 4096, 32),
        "gpt-13b": _gpt3(40, 5120, 40),
        "gpt-30b": _gpt3(48, 7168, 56),
        "gpt-66b": _gpt3(64, 9216, 72),
        "gpt-175b": _gpt3(96, 12288, 96),
    }
)
DEFAULT_PRESET = "gpt-mini"


def _gpt2(layers: int, width: int, heads: int, vocab: int = 50257, seq: int = 1024) -> Mapping[str, object]:
    return {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "vocab_size": vocab,
        "n_positions": seq,
        "resid_pdrop": 0.0,  # random init on much text: dropout would only slow it down
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _llama(
    layers: int, width: int, mlp: int, heads: int, kv: int, vocab: int, seq: int
) -> Mapping[str, object]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": seq,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
    }


# Shapes from Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), table 2, and
# Dubey et al., "The Llama 3 Herd of Models" (2024), table 3. The -tiny ones are ours: bytes, for tests.
HF_CONFIGS: Mapping[str, Mapping[str, object]] = types.MappingProxyType(
    {
        "gpt2-tiny": _gpt2(2, 64, 4, vocab=256, seq=256),
        "gpt2": _gpt2(12, 768, 12),
        "gpt2-medium": _gpt2(24, 1024, 16),
        "gpt2-large": _gpt2(36, 1280, 20),
        "gpt2-xl": _gpt2(48, 1600, 25),
        "llama-tiny": _llama(2, 64, 128, 4, 2, vocab=256, seq=256),
        "llama3-8b": _llama(32, 4096, 14336, 32, 8, vocab=128256, seq=8192),
        "llama3-70b": _llama(80, 8192, 28672, 64, 8, vocab=128256, seq=8192),
    }
)


def parse_model(text: str) -> ModelSpec:
    """The spec that a job's model name stands for; raises ModelError for a name nothing can come of."""
    prefix, _, rest = text.partition(":")
    with located(text):
        if prefix == SourceKind.BUILTIN:
            target = DEFAULT_PRESET if rest == "gpt" else rest
            _require_known(target, GPT_PRESETS, "built-in model")
            return ModelSpec(SourceKind.BUILTIN, target)
        if prefix == SourceKind.HF:
            target, _, head = rest.partition(":")
            return ModelSpec(SourceKind.HF, target, head or None)
    target, _, factory = text.rpartition(":")
    for folder, head in ((text, ""), (target, factory)):
        if folder and (Path(folder) / "config.json").is_file():
            path = folder if "/" in folder else f"./{folder}"  # a bare name may be that of a row, too
            return ModelSpec(SourceKind.HF, path, head or None)
    if not all(part.isidentifier() for part in factory.split(".")) or not target:
        hint = "use builtin:gpt-SIZE, hf:NAME, hf:FOLDER, file.py:factory or package.module:factory"
        raise ModelError(problem=f"cannot tell what model {text!r} is", where="model", hint=hint)
    return ModelSpec(SourceKind.FILE if target.endswith(".py") else SourceKind.MODULE, target, factory)


def gpt_options(preset: str, args: Mapping[str, object]) -> GPTOptions:
    """The preset with `args` laid over it; raises ModelError for an unknown name or impossible shape."""
    hints = get_type_hints(GPTOptions)
    values: dict[str, Any] = {}
    with located(f"builtin:{preset}"):
        for name, value in args.items():
            _require_known(name, hints, f"option for builtin:{preset}")
            values[name] = _coerce(name, value, hints[name])
        options = dataclasses.replace(GPT_PRESETS[preset], **values)
        _check_shape(options)
    return options


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest known name, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def _require_known(name: str, known: Iterable[str], noun: str) -> None:
    if name not in set(known):
        raise ModelError(f"unknown {noun} {name!r}", hint=nearest(name, known))


def _coerce(name: str, value: object, hint: object) -> object:
    """`value` as the field's type: files give enumerations as text, and nothing else is converted."""
    allowed = get_args(hint) or (hint,)
    kind = next(kind for kind in allowed if isinstance(kind, type))
    if issubclass(kind, StrEnum) and isinstance(value, str):
        if value not in [member.value for member in kind]:
            choices = ", ".join(kind)
            raise ModelError(f"{name} is {value!r}", hint=f"choose one of: {choices}")
        return kind(value)
    if type(value) not in allowed:
        raise ModelError(f"{name} is {value!r}", hint=f"give one {kind.__name__}")
    return value


def _check_shape(options: GPTOptions) -> None:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if type(value) is int and value < 1:
            raise ModelError(f"{field.name} is {value}", hint="give at least 1")
        if type(value) is int and value > (most := MOST_LAYERS if field.name == "layers" else MOST_COLUMNS):
            raise ModelError(f"{field.name} is {value}", hint=f"give at most {most}")
    if options.width % options.heads:
        problem = f"width {options.width} is not a multiple of heads {options.heads}"
        raise ModelError(problem, hint="every head needs the same number of columns")
    if options.heads % options.num_kv_heads:
        problem = f"heads {options.heads} is not a multiple of kv_heads {options.kv_heads}"
        raise ModelError(problem, hint="every key head serves the same number of heads")
    if options.rotary and options.head_width % 2:
        problem = f"rotary positions need an even head width, got {options.head_width}"
        raise ModelError(problem, hint="change width or heads, or set rotary: false")
