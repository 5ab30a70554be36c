"""Checkpointed parts of a forward: `torch.utils.checkpoint` calls its function once here, and says where it does.

A trace notes which operations lie in which part, and whoever differentiates the graph computes them again
(`recomputing.py`). The one-chip reference just runs them: random numbers of a second run would be other ones.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as trees
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointFunction, noop_context_fn

from comms.errors import CaptureError
from partitioner.capture.forwards.replaced import replaced

# torch's own users of the name
USERS = ("torch.utils.checkpoint", "torch.distributed._composable.checkpoint_activation")


@dataclass(frozen=True, eq=False)
class Region:
    """One call of `torch.utils.checkpoint`; `context_fn` makes the contexts that choose what is saved all the same.

    A reentrant one runs its function twice: without gradients, and in the backward with them.
    """

    context_fn: Callable[[], Any] = noop_context_fn
    is_reentrant: bool = False


RECOMPUTE = "recompute_regions"  # in a node's meta: the regions that it lies in, the outermost first
Span: TypeAlias = tuple[Region, int, int]  # with the nodes that it starts and stops at
Note: TypeAlias = Callable[[Region, Callable[[], object]], AbstractContextManager[None]]


def _unnoted(_: Region, __: Callable[[], object]) -> AbstractContextManager[None]:
    return nullcontext()


@contextmanager
def inlined_checkpoints(note: Note = _unnoted) -> Iterator[None]:
    """Inside the block a checkpointed function runs once, within `note(region, function)`, which may run it again."""

    def of_function(function: Any, _preserves: bool, *args: Any) -> Any:
        has_gradient = any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        region, run = Region(is_reentrant=True), partial(function, *args)
        with nullcontext() if has_gradient else torch.no_grad(), note(region, run):
            return _without_inner_gradients(run())

    def around(
        function: Any, _preserves: bool = True, context_fn: Any = noop_context_fn, _check: str = "",
        _debug: bool = False, _stops: bool = True, *args: Any, **kwargs: Any,
    ) -> Iterator[None]:  # fmt: skip
        _require_selective(context_fn)
        run = partial(function, *args, **kwargs)
        with note(Region(context_fn), run) if torch.is_grad_enabled() else nullcontext():
            yield

    users = [module for module in map(sys.modules.get, USERS) if module]
    generators = [(module, "_checkpoint_without_reentrant_generator", around) for module in users]
    with replaced([*generators, (CheckpointFunction, "apply", of_function)]):
        yield


@contextmanager
def noted(regions: list[Span], region: Region) -> Iterator[None]:
    """Add a region of the trace that is being made, before those inside it."""
    if get_proxy_mode() is None:
        yield
        return
    start = num_nodes()
    yield
    regions.insert(0, (region, start, num_nodes()))


def num_nodes() -> int:
    """How many nodes the trace that is being made has so far."""
    mode = get_proxy_mode()
    assert mode is not None
    return len(mode.tracer.graph.nodes)


def regions_of(node: Node) -> tuple[Region, ...]:
    """The regions that a node lies in."""
    found: tuple[Region, ...] = node.meta.get(RECOMPUTE, ())
    return found if node.op == "call_function" else ()  # a placeholder stands for what lies elsewhere


def _without_inner_gradients(output: Any) -> Any:
    """Of the reentrant form only tensors that are the output, or elements of a tuple of it, have a gradient."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple):
        return tuple(o if isinstance(o, torch.Tensor) else _detached(o) for o in output)
    return _detached(output)


def _detached(value: Any) -> Any:
    return trees.tree_map_only(torch.Tensor, torch.Tensor.detach, value)


def _require_selective(context_fn: Callable[[], Any]) -> None:
    """Refuse contexts that do anything but choose what is saved: they would run at other times than in torch."""
    if context_fn is noop_context_fn:
        return
    if not isinstance(context_fn()[0], checkpoint._CachingTorchDispatchMode):
        raise CaptureError(
            "checkpoint with a context_fn of its own", getattr(context_fn, "__qualname__", repr(context_fn)),
            "leave it out, or return create_selective_checkpoint_contexts(...)",
        )  # fmt: skip
