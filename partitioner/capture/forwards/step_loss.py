"""A step's loss: which entries of a batch the forward and the loss function are given, and where the loss is found.

By name: the forward is given those that it names, a loss function likewise after the model's output.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import nn

from comms.errors import CaptureError
from partitioner.capture.batch_inputs import Batch

LossFunction = Callable[..., torch.Tensor]
KEPT, BATCH = "kept_entries", "batch"


def loss_of_step(module: nn.Module, loss_fn: LossFunction | None, batch: Batch) -> torch.Tensor:
    """The loss of a batch: of its entries the forward is given those that it names, the loss function likewise.

    A loss function that needs one that is not there (or has a parameter `batch`) is given the batch.
    """
    taken = taken_by(module.forward, batch, loss_fn)
    output = module(**{name: value for name, value in batch.items() if name in taken})
    if loss_fn is None:
        return scalar_loss(output, type(module).__name__)
    named = _given(loss_fn, batch)
    if named is not None:
        return scalar_loss(loss_fn(output, **named), "loss_fn")
    try:
        return scalar_loss(loss_fn(output, batch), "loss_fn")
    except (AttributeError, KeyError, TypeError) as error:  # as where it meant an entry by another name
        problem = (
            f"the loss was given the whole batch, as no entry is called {parameters_of(loss_fn)[1].name}"
        )
        raise CaptureError(f"{problem}, and raised {type(error).__name__}: {error}", "loss_fn",
                           f"the batch has {', '.join(batch)}; name what is meant as there") from error  # fmt: skip


def warn_of_batch(loss_fn: LossFunction | None, batch: Batch) -> None:
    """Warn where a loss function is given the batch by a name that may have been meant as an entry's."""
    if loss_fn is not None and _given(loss_fn, batch) is None:
        name = parameters_of(loss_fn)[1].name
        if name != BATCH:
            said = f"the loss is given the whole batch as {name}, as no entry is called so: call it batch to say so"
            code = getattr(getattr(loss_fn, "forward", loss_fn), "__code__", None)
            place = (code.co_filename, code.co_firstlineno) if code else ("loss_fn", 0)
            warnings.warn_explicit(said, UserWarning, *place)


def _given(loss_fn: LossFunction, batch: Batch) -> Batch | None:
    """The entries that a loss function is given by name; None: it is given the batch. Raises CaptureError."""
    others = parameters_of(loss_fn)[1:]  # after the output
    given = {p.name: batch[p.name] for p in others if p.name in batch and p.kind is not p.POSITIONAL_ONLY}
    if any(p.kind is p.VAR_KEYWORD for p in others):
        given = dict(batch)
    missing = [
        p for p in others
        if p.name not in given and p.kind is not p.VAR_KEYWORD and (p.default is p.empty or p.name == BATCH)
    ]  # fmt: skip
    if not missing:
        return given
    takes = ", ".join(map(str, others))
    is_torchs = str(getattr(loss_fn, "__module__", "")).startswith("torch.")  # which knows no batches
    others_needed = [p for p in others if p.default is p.empty and p.name in given]
    is_named = others_needed or missing[0].name in batch or missing[0].kind is missing[0].KEYWORD_ONLY
    if len(missing) > 1 or is_named or is_torchs:
        raise CaptureError(f"after the output the loss takes {takes}, the batch has {', '.join(batch)}", "loss_fn",
                           "give a function that names them, or takes (output, batch)")  # fmt: skip
    return None


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """What a function or a module's forward takes. Raises CaptureError where that cannot be told."""
    called = function.forward if isinstance(function, nn.Module) else function
    if not callable(called):
        raise CaptureError(
            f"{called!r} is no function", "loss_fn", "give one of the output and entries of the batch"
        )
    try:
        return list(inspect.signature(called).parameters.values())
    except (ValueError, TypeError) as error:  # some builtins have no signature
        name = getattr(function, "__name__", type(function).__name__)
        raise CaptureError(
            f"{name} does not say what it takes", name, "wrap it in a function of yours"
        ) from error


def taken_by(forward: Callable[..., Any], batch: Batch, loss_fn: LossFunction | None) -> frozenset[str]:
    """The entries of a batch that a forward takes, but those that a loss function keeps to itself."""
    parameters = parameters_of(forward)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = frozenset(batch) if takes_all else frozenset(p.name for p in parameters) & frozenset(batch)
    return taken - getattr(loss_fn, KEPT, frozenset())


def keeping(loss_fn: LossFunction, entries: frozenset[str]) -> LossFunction:
    """The loss function, with entries that the forward is not given though it may take such names."""

    @wraps(loss_fn, updated=())
    def loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        return loss_fn(*args, **kwargs)

    setattr(loss, KEPT, entries)
    loss.__signature__ = inspect.Signature(parameters_of(loss_fn))  # type: ignore[attr-defined]
    return loss


def is_read(name: str, forward: Callable[..., Any], batch: Batch, loss_fn: LossFunction | None) -> bool:
    """Whether the forward or the loss may read an entry: it is named, or given with the whole batch."""
    if loss_fn is None or name in taken_by(forward, batch, loss_fn):
        return True
    named = _given(loss_fn, batch)
    return named is None or name in named


def scalar_loss(output: object, where: str = "the model") -> torch.Tensor:
    """The scalar a model returns: a tensor, `.loss`, `["loss"]` or the first of a tuple."""
    found: object = output
    if isinstance(output, Mapping) and "loss" in output:
        found = output["loss"]
    elif isinstance(loss := getattr(output, "loss", None), torch.Tensor):
        found = loss
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, torch.Tensor) or found.numel() != 1 or found.is_complex():
        got = f"shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        got = f"a complex number ({got})" if isinstance(found, torch.Tensor) and found.is_complex() else got
        hint = "return the loss (or an object with .loss), or give loss_fn"
        raise CaptureError(f"{where} returns {got}, not a scalar loss", where, hint)
    return found.reshape(())


def require_known_inputs(module: nn.Module, batch: Batch, loss_fn: LossFunction | None) -> None:
    """Refuse names that neither the forward nor the loss takes, or that they lack."""
    taken = taken_by(module.forward, batch, loss_fn) if loss_fn else frozenset(batch)
    takes = ", ".join(map(str, parameters_of(module.forward)))
    where = f"{type(module).__name__}.forward({takes})"
    for name in batch:
        if not is_read(name, module.forward, batch, loss_fn):
            raise unread(name, batch, where)
    try:
        inspect.signature(module.forward).bind(**{name: batch[name] for name in taken})
    except TypeError as error:
        hint = f"the batch has {', '.join(batch)}; name its entries as forward does"
        if "positional only" in str(error):
            hint = "leave the / out of forward: entries are given by name"
        elif loss_fn is None and "unexpected keyword" in str(error):
            hint += ", or give a loss function that takes the others"
        raise CaptureError(f"the batch does not fit the model: {error}", where, hint) from error


def unread(name: str, batch: Batch, where: str) -> CaptureError:
    """The error for an entry of the batch that nothing reads."""
    hint = f"the batch has {', '.join(batch)}; leave out what is not used, and take sizes from what is"
    return CaptureError(f"the batch's {name} is read by neither the model nor the loss", where, hint)
