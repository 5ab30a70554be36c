"""Hugging Face models: by the name of a configuration, a file or a folder, with a head for every task.

`hf:NAME` is a row of HF_CONFIGS or a kind of model that transformers knows (`hf:bert`, with the sizes of its
configuration class; `model_args` changes them), `hf:FILE.json` a configuration, `hf:FOLDER` (or `./FOLDER`) one with
weights beside it (`hf_weights`). Where a folder has the name of a row or kind, `hf:NAME` is refused and `hf:./NAME` is
the folder. A head follows after a colon: a word of HEADS, or a class of transformers;
without one the configuration's `architectures` say it, else the first head that the kind of model has.

Models are as transformers makes them for training: with their own loss and dropout, attention by sdpa where they have
it, else eager; caches off. Only a causal head that is fed text (`shifted`) gets labels that are already shifted: its
loss is then that of builtin_gpt. Nothing is ever downloaded.
"""

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comms.errors import ModelError, located
from orchestrator.models.builtin_gpt import next_token_loss
from orchestrator.models.hf_weights import holds_model, load_folder, one_line
from orchestrator.models.model_specs import HF_CONFIGS, ModelSpec, nearest

STRIDE = 7919  # a prime: example tokens walk over the whole vocabulary

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
# By head: its auto class, and the shapes of its example labels (n samples, s tokens, h x w pixels). In the order in
# which a kind of model that has several is given one.
HEADS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "seq2seq": ("AutoModelForSeq2SeqLM", {"labels": "ns"}),
    "speech": ("AutoModelForSpeechSeq2Seq", {"labels": "ns"}),
    "masked": ("AutoModelForMaskedLM", {"labels": "ns"}),
    "causal": ("AutoModelForCausalLM", {"labels": "ns"}),
    "contrastive": ("AutoModelForZeroShotImageClassification", {}),
    "image-text": ("AutoModelForImageTextToText", {"labels": "ns"}),
    "image": ("AutoModelForImageClassification", {"labels": "n"}),
    "ctc": ("AutoModelForCTC", {"labels": "ns"}),
    "audio": ("AutoModelForAudioClassification", {"labels": "n"}),
    "segmentation": ("AutoModelForSemanticSegmentation", {"labels": "nhw"}),
    "classification": ("AutoModelForSequenceClassification", {"labels": "n"}),
    "tokens": ("AutoModelForTokenClassification", {"labels": "ns"}),
    "qa": ("AutoModelForQuestionAnswering", {"start_positions": "n", "end_positions": "n"}),
    "choice": ("AutoModelForMultipleChoice", {"labels": "n"}),
    "masked-image": ("AutoModelForMaskedImageModeling", {}),
    "video": ("AutoModelForVideoClassification", {"labels": "n"}),
    "depth": ("AutoModelForDepthEstimation", {"labels": "nhw"}),
}
OF_VOCABULARY = ("seq2seq", "speech", "masked", "causal", "image-text", "ctc")  # their labels are tokens
LABELS = frozenset(
    {"labels", "label_ids", "start_positions", "return_loss", "next_sentence_label"}
)  # ask for a loss
SOUND = 6400  # samples of sound in an example: 0.4 s, as spans of 0.2 s are masked
SPECTRA = 1600  # of sound, in an example
START = "decoder_start_token_id"
# What transformers makes of values that do not go together.
MISFITS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
# Options of configurations that something else decides here, and what.
WITHOUT_EFFECT: Mapping[str, str] = {
    "dtype": "set the job's dtype", "torch_dtype": "set the job's dtype",
    "architectures": "name the class after a colon, hf:NAME:CLASS", "model_type": "name it, hf:KIND",
    "attn_implementation": "remove it: attention is by sdpa, or else eager",
    "name_or_path": "remove it", "transformers_version": "remove it",
}  # fmt: skip
CTC_LABELS = 2  # few, as sound is short


@dataclass(frozen=True, slots=True)
class HfModel:
    """A model of transformers and what was found out about it."""

    module: nn.Module
    head: str  # a word of HEADS; a class that is none of them goes by its name
    vocab_size: int | None
    max_seq: int | None
    tp_plan: Mapping[str, str]
    example: Callable[[int, int], Mapping[str, Any]]
    said: tuple[str, ...]  # what became of a folder's weights otherwise than their owner may think


def build_hf(
    spec: ModelSpec, args: Mapping[str, object], device: str, dtype: torch.dtype, *, shifted: bool
) -> HfModel:
    """The model of a name, its start values drawn by torch's generator. Raises ModelError."""
    transformers = _import_transformers()
    folder = _folder(transformers, spec)
    values = _values(transformers, spec, folder)
    config = _config(transformers, spec, args, values)
    kind, head = _class_of(transformers, spec, config, values)
    module, said = _made(kind, config, folder, device, is_new_head=spec.factory is not None)
    module.train()
    if head == "causal" and shifted:
        module.loss_function = lambda logits, labels, **_: next_token_loss(logits, labels)
    for tensor in module.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():  # derived buffers (rotary frequencies) keep their precision
            tensor.data = tensor.data.to(dtype)
    vocab = _first(config, "vocab_size")
    example = _example(module, config, head, device)
    longest = _first(config, "max_position_embeddings")
    return HfModel(module, head, vocab, longest, _plan(module, config.model_type), example, said)


def _import_transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        problem = "hf: models need the transformers package"
        hint = "pip install 'orchestrate-chips[hf]'"
        raise ModelError(problem=problem, where="model", hint=hint) from error


def _folder(transformers: Any, spec: ModelSpec) -> Path | None:
    """The folder that a name means, if it does. Raises ModelError where it could mean something else as well."""
    path = Path(spec.target)
    if spec.target not in HF_CONFIGS and spec.target not in transformers.CONFIG_MAPPING:
        return path if path.is_dir() else None
    if holds_model(path):
        problem = f"{spec.target} is a known configuration and a folder here"
        hint = f"hf:./{spec.target} is the folder; for the other one rename it"
        raise ModelError(problem, f"hf:{spec.target}", hint)
    return None


def _values(transformers: Any, spec: ModelSpec, folder: Path | None) -> dict[str, Any]:
    """What the configuration says, `model_type` included."""
    if spec.target in HF_CONFIGS:
        return dict(HF_CONFIGS[spec.target])
    path = Path(spec.target)
    if path.suffix != ".json" and folder is None:
        if spec.target in transformers.CONFIG_MAPPING:
            return {"model_type": spec.target}
        hint = nearest(spec.target, HF_CONFIGS)
        raise ModelError(
            f"no configuration {spec.target!r}", hint=f"{hint} (or a model_type of transformers)"
        )
    path = folder / "config.json" if folder else path
    with located("model", "give the path of a config.json, or of a folder that has one"):
        try:
            values = json.loads(path.read_text())
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ModelError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ModelError(f"{path} does not hold a JSON object")
        named = values.get("architectures") or []
        if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
            raise ModelError(f"architectures of {path} is {named!r}, no list of names")
    return values


def _config(transformers: Any, spec: ModelSpec, args: Mapping[str, object], given: Mapping[str, Any]) -> Any:
    values = {**given, **args}
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        problem = f"model_type {model_type!r} is not one that transformers {transformers.__version__} knows"
        raise ModelError(problem, hint="use the config.json of a released model")
    config_class = transformers.CONFIG_MAPPING[model_type]
    usual = config_class()
    if getattr(usual, "is_encoder_decoder", False) and getattr(usual, START, None) is None:
        values.setdefault(START, usual.pad_token_id)  # as T5 starts its decoders
    values |= {"use_cache": False} if hasattr(usual, "use_cache") else {}
    _check_args(spec, args, usual)
    invalid = importlib.import_module("huggingface_hub.errors").StrictDataclassError
    try:
        config = config_class(**values)
    except (invalid, *MISFITS) as error:
        raise ModelError(one_line(error), hint="mend the configuration") from error
    for name, value in args.items():
        if isinstance(value, int | float | str) and getattr(config, name, value) != value:
            problem = f"{name} has no effect: it stays {getattr(config, name)!r}"
            raise ModelError(problem, f"model_args of {spec}", "remove it, or change what decides it")
    return config


def _check_args(spec: ModelSpec, args: Mapping[str, object], usual: Any) -> None:
    """Configurations take any keyword and ignore what they do not know: raises ModelError for such ones."""
    for name, value in args.items():
        if name in WITHOUT_EFFECT:
            raise ModelError(f"{name} has no effect", f"model_args of {spec}", WITHOUT_EFFECT[name])
        known = name == START or (not name.startswith("_") and hasattr(usual, name))
        own = getattr(usual, name, None)
        if not known or callable(own):
            hint = f"use an attribute of {type(usual).__name__}"
            raise ModelError(f"unknown option {name!r}", f"model_args of {spec}", hint)
        if isinstance(value, Mapping) and hasattr(own, "to_diff_dict"):
            _check_args(spec, value, own)


def _class_of(transformers: Any, spec: ModelSpec, config: Any, values: Mapping[str, Any]) -> tuple[Any, str]:
    """The class of transformers to be made, and its head."""
    has = {word: kind for word, (auto, _) in HEADS.items() if (kind := _auto(transformers, auto, config))}
    wanted = spec.factory or next(iter(values.get("architectures") or []), None)
    if wanted in has:
        return has[wanted], wanted
    if wanted is not None and (kind := getattr(transformers, wanted.replace("-", "_"), None)) is not None:
        if not LABELS & set(inspect.signature(getattr(kind, "forward", kind)).parameters):
            raise ModelError(
                f"{wanted} has no loss", f"hf:{spec.target}", f"name a head: {_heads(spec, has)}"
            )
        if not issubclass(type(config), getattr(kind, "config_class", None) or object):
            raise ModelError(f"{wanted} is no model of kind {config.model_type}", f"hf:{spec.target}",
                             f"name one of: {_heads(spec, has)}")  # fmt: skip
        return kind, next((word for word, each in has.items() if each is kind), wanted)
    if wanted is not None:
        problem = f"{config.model_type} has no head {wanted!r}"
        raise ModelError(problem, f"hf:{spec.target}", f"it has {', '.join(has)}, or a class of transformers")
    is_pair = getattr(config, "is_encoder_decoder", False)
    order = [word for word in has if is_pair or word != "seq2seq"]
    if not order:
        raise ModelError(f"{config.model_type} has no head that is known here", f"hf:{spec.target}",
                         f"name a class of transformers: hf:{spec.target}:CLASS")  # fmt: skip
    return has[order[0]], order[0]


def _heads(spec: ModelSpec, has: Mapping[str, Any]) -> str:
    return ", ".join(f"hf:{spec.target}:{word}" for word in has) or f"hf:{spec.target}:CLASS"


def _auto(transformers: Any, auto: str, config: Any) -> Any:
    mapping = getattr(transformers, auto)._model_mapping
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple | list) else found


def _made(
    kind: Any, config: Any, folder: Path | None, device: str, *, is_new_head: bool
) -> tuple[Any, tuple[str, ...]]:
    """An instance, with the folder's weights if there are any to hold; attention as it can be had."""
    refused: Exception | None = None
    for attention in ("sdpa", "eager"):
        try:
            if folder is None or device == "meta":
                return kind._from_config(config, attn_implementation=attention, dtype=torch.float32), ()
            with torch.device("meta"):  # what is wrong with the configuration is not the weights' fault
                kind._from_config(config, attn_implementation=attention)
            return load_folder(kind, config, folder, attention, is_new_head=is_new_head)
        except (ImportError, *MISFITS) as error:
            refused = error
    assert refused is not None
    raise ModelError(one_line(refused), hint="mend the configuration, or name another head") from refused


def _plan(module: Any, model_type: str) -> dict[str, str]:
    if model_type == "gpt2":
        return dict(GPT2_PLAN)
    plan = module.tp_plan or {}
    return {pattern: HF_STYLES[style] for pattern, style in plan.items() if style in HF_STYLES}


def _first(config: Any, name: str) -> int | None:
    """A number of the configuration, or of that of its text."""
    for part in (config, getattr(config, "text_config", None), getattr(config, "decoder", None)):
        if isinstance(value := getattr(part, name, None), int):
            return value
    return None


def _example(module: Any, config: Any, head: str, device: str) -> Callable[[int, int], Mapping[str, Any]]:
    """Example batches of (samples, tokens) for what the model reads first and the labels of its head."""
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", None) or 64
    high, wide = side if isinstance(side, tuple | list) else (side, side)
    vocab = _first(config, "vocab_size") or 2
    first = {"contrastive": "pixel_values"}.get(head, getattr(module, "main_input_name", "input_ids"))

    def example(samples: int, tokens: int) -> Mapping[str, Any]:
        sizes = {"n": samples, "s": CTC_LABELS if head == "ctc" else tokens, "h": high, "w": wide}
        found: dict[str, Any] = {}
        if first == "input_ids" or head in ("contrastive", "image-text"):
            shape = (samples, 2, tokens) if head == "choice" else (samples, tokens)
            found["input_ids"] = walk(shape, vocab, device)
        if first == "pixel_values":
            frames = (config.num_frames,) if head == "video" else ()
            shape = (samples, *frames, getattr(vision, "num_channels", 3), high, wide)
            found["pixel_values"] = torch.zeros(shape, device=device)
        elif first == "input_values":
            is_flat = not hasattr(config, "num_mel_bins") or hasattr(config, "conv_kernel")
            shape = (samples, SOUND) if is_flat else (samples, config.max_length, config.num_mel_bins)
            found["input_values"] = torch.zeros(shape, device=device)
        elif first == "input_features":
            shape = (samples, config.num_mel_bins, 2 * getattr(config, "max_source_positions", SPECTRA // 2))
            found["input_features"] = torch.zeros(shape, device=device)
        classes = vocab if head in OF_VOCABULARY else tokens if head == "qa" else int(config.num_labels)
        labels = HEADS[head][1] if head in HEADS else {"labels": "ns"}
        found |= {k: walk([sizes[dim] for dim in dims], classes, device, 1) for k, dims in labels.items()}
        if head == "causal":
            found["labels"] = walk((samples, tokens + 1), vocab, device)[:, 1:].contiguous()
            found["input_ids"] = walk((samples, tokens + 1), vocab, device)[:, :-1].contiguous()
        if head == "masked-image":
            patches = (high // config.patch_size) * (wide // config.patch_size)
            found["bool_masked_pos"] = walk((samples, patches), 2, device).bool()
        return found | ({"return_loss": True} if head == "contrastive" else {})

    return example


def walk(shape: Any, high: int, device: str, start: int = 0) -> Tensor:
    """Whole numbers below `high`, all of them if there is room."""
    total = int(torch.Size(shape).numel())
    return ((torch.arange(total, device=device) + start) * STRIDE % high).view(*shape)
