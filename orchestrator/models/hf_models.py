"""Hugging Face models: by the name of a configuration, a file or a folder, with a head for every task.

`hf:NAME` is a row of HF_CONFIGS or a kind of model that transformers knows (`hf:bert`, with the sizes of its
configuration class; `model_args` changes them), `hf:FILE.json` a configuration, `hf:FOLDER` (or `./FOLDER`) one with
weights beside it (`*.safetensors`). A head follows after a colon: a word of HEADS, or a class of transformers;
without one the configuration's `architectures` say it, else the first head that the kind of model has.

Models are as transformers makes them for training: with their own loss and dropout, attention by sdpa where they have
it, else eager; caches off. Only a causal head that is fed text (`shifted`) gets labels that are already shifted: its
loss is then that of builtin_gpt. What a folder lacks is drawn from the seed if the head was asked for by name, as that
is how a new head is trained; else it is an error. Nothing is ever downloaded.
"""

import importlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comms.errors import ModelError, located
from orchestrator.models.builtin_gpt import next_token_loss
from orchestrator.models.model_specs import HF_CONFIGS, ModelSpec, nearest

STRIDE = 7919  # a prime: example tokens walk over the whole vocabulary
Sizes = Mapping[str, int]

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
SECOND = 1600  # samples of sound in an example, a tenth of a second
START = "decoder_start_token_id"
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


def build_hf(
    spec: ModelSpec, args: Mapping[str, object], device: str, dtype: torch.dtype, *, shifted: bool
) -> HfModel:
    """The model of a name, its start values drawn by torch's generator. Raises ModelError."""
    transformers = _import_transformers()
    values = _values(transformers, spec)
    config = _config(transformers, spec, args, values)
    kind, head = _class_of(transformers, spec, config, values)
    module = _made(kind, config, Path(spec.target), device, is_new_head=spec.factory is not None).train()
    if head == "causal" and shifted:
        module.loss_function = lambda logits, labels, **_: next_token_loss(logits, labels)
    for tensor in module.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():  # derived buffers (rotary frequencies) keep their precision
            tensor.data = tensor.data.to(dtype)
    vocab = _first(config, "vocab_size")
    example = _example(module, config, head, device)
    longest = _first(config, "max_position_embeddings")
    return HfModel(module, head, vocab, longest, _plan(module, config.model_type), example)


def _import_transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        problem = "hf: models need the transformers package"
        hint = "pip install 'orchestrate-chips[hf]'"
        raise ModelError(problem=problem, where="model", hint=hint) from error


def _values(transformers: Any, spec: ModelSpec) -> dict[str, Any]:
    """What the configuration says, `model_type` included."""
    if spec.target in HF_CONFIGS:
        return dict(HF_CONFIGS[spec.target])
    path = Path(spec.target)
    if path.suffix != ".json" and not path.is_dir():
        if spec.target in transformers.CONFIG_MAPPING:
            return {"model_type": spec.target}
        hint = nearest(spec.target, HF_CONFIGS)
        raise ModelError(
            f"no configuration {spec.target!r}", hint=f"{hint} (or a model_type of transformers)"
        )
    path = path / "config.json" if path.is_dir() else path
    with located("model", "give the path of a config.json, or of a folder that has one"):
        try:
            values = json.loads(path.read_text())
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ModelError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ModelError(f"{path} does not hold a JSON object")
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
    for name in args:
        # Configurations take any keyword and ignore what they do not know: a typo must not pass.
        if not hasattr(usual, name) and name != START:
            hint = f"use an attribute of {config_class.__name__}"
            raise ModelError(f"unknown option {name!r}", where=f"model_args of {spec}", hint=hint)
    invalid = importlib.import_module("huggingface_hub.errors").StrictDataclassError
    try:
        return config_class(**values)
    except (invalid, ValueError, TypeError) as error:
        raise ModelError(_one_line(error), hint="mend the configuration") from error


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


def _made(kind: Any, config: Any, folder: Path, device: str, *, is_new_head: bool) -> Any:
    """An instance, with the folder's weights if there are any to hold; attention as it can be had."""
    refused: Exception | None = None
    for attention in ("sdpa", "eager"):
        try:
            if not folder.is_dir() or device == "meta":
                return kind._from_config(config, attn_implementation=attention, dtype=torch.float32)
            return _loaded(kind, config, folder, attention, is_new_head=is_new_head)
        except (ValueError, TypeError, ImportError) as error:
            refused = error
    assert refused is not None
    raise ModelError(_one_line(refused), hint="mend the configuration, or name another head") from refused


def _loaded(kind: Any, config: Any, folder: Path, attention: str, *, is_new_head: bool) -> Any:
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has no weights (*.safetensors)", "model",
                         f"save them there, or start from the seed: hf:{folder}/config.json")  # fmt: skip
    try:
        with _quiet(), torch.device("cpu"):
            module, report = kind.from_pretrained(
                str(folder), config=config, attn_implementation=attention, dtype=torch.float32,
                local_files_only=True, use_safetensors=True, output_loading_info=True,
            )  # fmt: skip
    except (OSError, RuntimeError) as error:
        raise ModelError(_one_line(error), str(folder), "give a folder that save_pretrained wrote") from error
    if report["missing_keys"] and not is_new_head:
        name = sorted(report["missing_keys"])[0]
        raise ModelError(f"the weights lack {name} ({len(report['missing_keys'])} tensors)", str(folder),
                         "name the head that is to be trained anew, after a colon")  # fmt: skip
    return module


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers prints what it loads; what matters of it is an error here."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


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
            shape = (samples, SECOND) if is_flat else (samples, config.max_length, config.num_mel_bins)
            found["input_values"] = torch.zeros(shape, device=device)
        elif first == "input_features":
            shape = (samples, config.num_mel_bins, 2 * getattr(config, "max_source_positions", SECOND // 2))
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
