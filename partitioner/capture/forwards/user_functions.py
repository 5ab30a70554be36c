"""The user's own autograd functions: each call becomes one operation of the captured graph.

Traced like other code, a `torch.autograd.Function` would leave its forward behind and lose its backward. Here what
every `apply` ends in, also one that was bound before (`f = MyFunction.apply`), records one node whose target, an
`AppliedFunction`, applies the function again when the node is interpreted: where gradients are traced, the user's
backward is what gets traced.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensor, disable_functional_mode
from torch.autograd import Variable
from torch.autograd.function import _SingleLevelFunction
from torch.fx.experimental.proxy_tensor import (
    PythonKeyTracer,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as trees

from comms.errors import CaptureError, method_line
from partitioner.capture.forwards.keyed_random import DRAWN, REFUSED
from partitioner.capture.forwards.replaced import replaced
from partitioner.capture.refused.refusals import refusing
from partitioner.capture.source_lines import running_line

original: Callable[..., Any] = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]
SETS_DATA = ("the forward sets .data, which leaves no trace", "write buffers with copy_(), or assign them")


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
        return original(self.function, *trees.tree_unflatten(leaves, self.spec))

    def __repr__(self) -> str:
        return f"{self.function.__module__}.{self.__name__}{tuple(self.leaves)}"


def _apply(
    shared: list[tuple[type, torch.Tensor, int]], registered: Mapping[int, str], cls: type[torch.autograd.Function],
    *args: Any,
) -> Any:  # fmt: skip
    mode = get_proxy_mode()
    leaves, spec = trees.tree_flatten(args)
    if mode is None:
        result = torch._C._FunctionBase.__dict__["apply"].__get__(None, cls)(*args)
        _go_back(cls, leaves, result, registered)
        return result
    if not any(isinstance(leaf, FunctionalTensor) for leaf in leaves):
        result = _recorded(cls, leaves, spec, mode.tracer)
        if _storages(result) & _storages(leaves):
            involved = [v for v in trees.tree_leaves((leaves, result)) if isinstance(v, torch.Tensor)]
            shared += zip([cls] * len(involved), involved, _versions(involved), strict=True)
        return result
    inner = [leaf.from_functional() if isinstance(leaf, FunctionalTensor) else leaf for leaf in leaves]
    with disable_functional_mode():
        result = _recorded(cls, inner, spec, mode.tracer)
    return trees.tree_map_only(torch.Tensor, FunctionalTensor.to_functional, result)


def _storages(values: Any) -> set[int]:
    leaves = trees.tree_leaves(values)
    with torch._C.DisableTorchFunction():  # what we ask is none of the calls of the forward
        return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, torch.Tensor)}


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    with torch._C.DisableTorchFunction():
        return [tensor._version for tensor in tensors]


def _recorded(
    cls: type[torch.autograd.Function], leaves: Sequence[Any], spec: trees.TreeSpec, tracer: object
) -> Any:
    target = AppliedFunction(cls, leaves, spec)
    assert isinstance(tracer, PythonKeyTracer)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    before = _versions(tensors)
    with disable_proxy_modes_tracing():
        result = original(cls, *trees.tree_unflatten(list(leaves), spec))  # which comes through `_apply`
    if before != _versions(tensors):
        problem = f"the autograd function {cls.__qualname__} writes into its operands"
        raise CaptureError(problem, method_line(cls, "forward"), "let it return new tensors")
    proxy = tracer.create_proxy("call_function", target, tuple(map(tracer.unwrap_proxy, tensors)), {})
    track_tensor_tree(result, proxy, constant=None, tracer=tracer)
    return result


def _go_back(
    cls: type[torch.autograd.Function], leaves: Sequence[Any], result: Any, registered: Mapping[int, str]
) -> None:
    """Run the backward too, on stand-ins: what it draws, reads and calls is seen as what the forward does is."""
    with torch._C.DisableTorchFunction():
        ends = [v for v in trees.tree_leaves(result) if isinstance(v, torch.Tensor) and v.requires_grad]
        starts = [v for v in leaves if isinstance(v, torch.Tensor) and v.requires_grad]
        grads = [torch.ones_like(end) for end in ends]
    if ends and starts:
        with _OwnOperands(cls, {k: name for k, name in registered.items() if k not in map(id, leaves)}):
            # as torch.autograd.grad, which forwards may not call; the graph is kept, and some may be without a gradient
            Variable._execution_engine.run_backward(
                tuple(ends), tuple(grads), True, False, tuple(starts), True, False
            )


SWITCHES = (
    torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast,
)  # fmt: skip


class _OwnOperands(TorchFunctionMode):
    """Refuses that a backward computes with tensors of the model that its forward was not given, or writes into them:
    it runs where a pipeline stage, or a replica, has others, and each but once."""

    def __init__(self, cls: type[torch.autograd.Function], registered: Mapping[int, str]) -> None:
        super().__init__()
        self.cls, self.registered = cls, registered

    def __torch_function__(
        self, func: Callable[..., Any], _types: object, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        if func in SWITCHES:  # of what the backward is under: they would be noted in the graph of the forward
            with torch._C.DisableTorchFunction():
                return func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in (*DRAWN, *REFUSED, "keyed_uniform"):
            problem = f"the backward of {self.cls.__qualname__} draws random numbers"
            hint = "draw in its forward, and keep what is drawn by save_for_backward"
            raise CaptureError(problem, running_line(), hint)
        made = func(*args, **(kwargs or {}))
        if any(isinstance(each, torch.Tensor) for each in trees.tree_leaves(made)):
            for read in (r for r in trees.tree_leaves((args, kwargs or {})) if id(r) in self.registered):
                name = self.registered[id(read)].partition(":")[2]
                kind = self.cls.__qualname__
                problem = f"the backward of {kind} computes with {name}, which its forward is not given"
                hint = "pass it to apply, and keep it with ctx.save_for_backward"
                raise CaptureError(problem, method_line(self.cls, "backward"), hint)
        return made


@contextmanager
def recorded_functions(registered: Mapping[int, str]) -> Iterator[None]:
    """While a forward is traced, its autograd functions are recorded; sets of `.data` are refused. `registered`: names
    of the model's stand-ins, by identity."""
    # what may lie in one storage, and how often it was written
    shared: list[tuple[type, torch.Tensor, int]] = []
    apply = classmethod(lambda cls, *args: _apply(shared, registered, cls, *args))
    data = property(torch._C.TensorBase.__dict__["data"].__get__, refusing(*SETS_DATA))
    with replaced([(_SingleLevelFunction, "apply", apply), (torch.Tensor, "data", data)]):
        yield
    for cls, value, version in shared:
        if _versions([value]) != [version]:
            name = cls.__qualname__
            problem = (
                f"what the autograd function {name} returns lies where its operand does, and is written later"
            )
            raise CaptureError(
                problem, method_line(cls, "forward"), "let it return new tensors, or write out of place"
            )
