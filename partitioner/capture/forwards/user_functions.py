"""The user's own autograd functions: each call becomes one operation of the captured graph.

Traced like other code, a `torch.autograd.Function` would leave its forward behind and lose its backward. Here `apply`
records one node whose target, an `AppliedFunction`, applies the function again when the node is interpreted: where
gradients are traced, the user's backward is what gets traced. What a graph cannot hold (hooks on values, gradients
taken inside a forward) is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import (
    PythonKeyTracer,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)
from torch.utils import _pytree as trees
from torch.utils.checkpoint import CheckpointFunction

from comms.errors import CaptureError

original: Callable[..., Any] = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]
REFUSED = {
    "register_hook": (torch.Tensor, "a hook on a value would not run"),
    "backward": (torch.autograd, "the forward computes gradients itself"),
    "grad": (torch.autograd, "the forward computes gradients itself"),
}


class AppliedFunction:
    """A call of an autograd function with all arguments but its tensors."""

    def __init__(
        self, function: type[torch.autograd.Function], leaves: Sequence[Any], spec: trees.TreeSpec
    ) -> None:
        self.function, self.spec = function, spec
        self.leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.__name__ = function.__qualname__

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """Apply it to tensors, in the order of the call."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = trees.tree_unflatten(leaves, self.spec)
        return original(self.function, *args, **kwargs)

    def __repr__(self) -> str:
        return f"{self.function.__module__}.{self.__name__}{tuple(self.leaves)}"


def _apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    mode = get_proxy_mode()
    if mode is None:
        return original(cls, *args, **kwargs)
    if cls is CheckpointFunction:  # (function, whether to keep random state, its arguments)
        return args[0](*args[2:])
    if any(isinstance(leaf, FunctionalTensor) for leaf in trees.tree_leaves((args, kwargs))):
        problem = f"the autograd function {cls.__qualname__} in a forward that writes into tensors"
        raise CaptureError(problem, cls.__module__, "use operators out of place in this forward")
    leaves, spec = trees.tree_flatten((args, kwargs))
    target, tracer = AppliedFunction(cls, leaves, spec), mode.tracer
    assert isinstance(tracer, PythonKeyTracer)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    with disable_proxy_modes_tracing():
        result = original(cls, *args, **kwargs)
    proxy = tracer.create_proxy("call_function", target, tuple(map(tracer.unwrap_proxy, tensors)), {})
    track_tensor_tree(result, proxy, constant=None, tracer=tracer)
    return result


def _refusal(problem: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise CaptureError(problem, hint="move it out of the forward")

    return refuse


@contextmanager
def recorded_functions() -> Iterator[None]:
    """While a forward is traced: its autograd functions are recorded, what no graph can hold is refused."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.autograd.Function, "apply", classmethod(_apply)))
        for name, (owner, problem) in REFUSED.items():
            stack.enter_context(patch.object(owner, name, _refusal(problem)))
        yield
