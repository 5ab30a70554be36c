"""Weights of a folder: what does not fit a model of transformers is refused by name, what is new or left out is said.

Loaded are `*.safetensors`, else `pytorch_model*.bin` (tensors only, no code), whole or in shards, in float32 whatever
`dtype` the configuration has: the job's is the one that counts. A part of the model (what its body or the model itself
holds by name: `encoder`, `pooler`, `classifier`) is there or not as a whole. A part that only the folder has is left
out, one that only the model has is drawn from the seed if a head was asked for by name, as a new head is trained; both
are said. A part that both have must have the same tensors, of the same shapes, in both.
"""

import importlib
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from comms.errors import ModelError

FORMATS = ("*.safetensors", "pytorch_model*.bin")
HINT = "give a folder that save_pretrained wrote"
AS_SAVED = "leave the configuration as it was saved, also by model_args"


def holds_model(folder: Path) -> bool:
    """Whether a folder is one of a configuration or of weights."""
    return any(next(folder.glob(kind), None) for kind in ("config.json", *FORMATS))


def load_folder(
    kind: Any, config: Any, folder: Path, attention: str, *, is_new_head: bool
) -> tuple[Any, tuple[str, ...]]:
    """A model of a sound configuration with the folder's weights, and what is to be said of them. Raises ModelError."""
    found = next((each for each in FORMATS if any(folder.glob(each))), None)
    if found is None:
        raise ModelError(f"{folder} has no weights ({' or '.join(FORMATS)})", "model",
                         f"save them there, or start from the seed: hf:{folder}/config.json")  # fmt: skip
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            "it holds an adapter", str(folder), "merge it (merge_and_unload) and save the whole model"
        )
    try:
        with without_talk(), torch.device("cpu"):
            module, report = kind.from_pretrained(
                str(folder), config=config, attn_implementation=attention, dtype=torch.float32, local_files_only=True,
                use_safetensors=found == FORMATS[0], ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # files of others: whatever their readers make of them
        said = one_line(error).partition(". ")[0]
        raise ModelError(f"the weights cannot be read: {said}", str(folder), HINT) from error
    _check_shapes(report["mismatched_keys"], str(folder))
    return module, _checked_parts(module, report, str(folder), is_new_head=is_new_head)


def one_line(error: Exception) -> str:
    """What an error of other code says, with its kind where it says no more than a name."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__} {said}".rstrip() if isinstance(error, LookupError) or not said else said


def _check_shapes(mismatched: Collection[tuple[str, Any, Any]], where: str) -> None:
    if mismatched:
        name, there, here = sorted(mismatched, key=lambda each: each[0])[0]
        more = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
        problem = f"{name} is {list(there)} in the weights, {list(here)} by the configuration{more}"
        raise ModelError(problem, where, AS_SAVED)


def _checked_parts(
    module: Any, report: Mapping[str, Collection[str]], where: str, *, is_new_head: bool
) -> tuple[str, ...]:
    """What is to be said of parts that only one side has. Raises ModelError for parts that are not the same in both."""
    body = f"{module.base_model_prefix}."

    def part(name: str) -> str:
        return name.removeprefix(body).partition(".")[0]

    lacking, left_out = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    own = module.state_dict().keys()
    tied = getattr(module, "all_tied_weights_keys", None) or {}
    loaded = {part(name) for name in own - set(lacking) - tied.keys()}
    broken = [name for name in lacking if part(name) in loaded]
    if broken or (lacking and not (is_new_head and loaded)):
        hint = HINT if broken or not loaded else "name the head that is to be trained anew, after a colon"
        raise ModelError(f"the weights lack {_named(broken or lacking)}", where, hint)
    refused = [name for name in left_out if part(name) in {part(each) for each in own}]
    if refused:
        problem = f"{type(module).__name__} of this configuration does not take {_named(refused)}"
        raise ModelError(problem, where, AS_SAVED)
    said = [f"{where}: drawn from the seed: {_named(lacking)}"] if lacking else []
    return (*said, *([f"{where}: not used: {_named(left_out)}"] if left_out else []))


def _named(names: list[str]) -> str:
    """The first, and how many there are."""
    return f"{names[0]} ({len(names)} tensors)" if len(names) > 1 else names[0]


@contextmanager
def without_talk() -> Iterator[None]:
    """transformers prints what it loads; what matters of it is said here."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    bars = importlib.import_module("transformers.utils.logging")
    has_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(before)
        if has_bars:
            bars.enable_progress_bar()
