"""Refusals: what of a forward no graph can hold, and how a failure is told: operator, line and submodule, and a hint.

Hooks would not run, and gradients cannot be taken or read. What is asked of autograd besides: `autograd_questions`.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol
from unittest.mock import patch

import torch
import torch._functorch.apis
import torch._functorch.eager_transforms
import torch.autograd.forward_ad
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, get_proxy_mode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from comms.errors import CaptureError
from partitioner.capture.batch_inputs import is_plain_kind
from partitioner.capture.captured_graph import op_name
from partitioner.capture.forwards.replaced import replaced
from partitioner.capture.source_lines import first_user_line, in_module, is_users, source_line
from partitioner.capture.type_questions import READER

# what torch raises where code asks for the value of a tensor
OF_VALUES = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
BY_VALUES = "shapes and branches must not depend on tensor values; move such code out of forward"
INSTEAD = {  # of operators whose results' sizes depend on values
    "bincount": "its length depends on values: one_hot(x, classes).sum(0) has a known one",
    "nonzero": "the number of its results depends on values: use a mask with where, or masked_fill",
    "masked_select": "the number of its results depends on values: use a mask with where, or masked_fill",
    "unique": "the number of its results depends on values: find them where the data is made",
    "repeat_interleave": "its length depends on values: pass output_size, or a number as repeats",
    "linalg_lstsq": "it looks at values: use linalg.pinv(a) @ b, or solve the normal equations",
    "_ctc_loss": "give it rows: log_probs [steps, samples, classes] and targets [samples, longest]",
}
NO_HOOKS = "leave it out: record values with forward hooks, and change gradients in an autograd.Function"
SPARSE_AT = {"embedding": 4, "embedding_bag": 5}  # which argument asks for sparse gradients
WRITING_NORMS = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_impl_index"}
BY_HAND = "write the derivative out as a formula"
MODULE_HOOKS = (
    "register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook"
)  # fmt: skip
SEEDS = ("manual_seed", "seed", "set_rng_state", "fork_rng")
SEEDED = "leave it out: numbers follow from seed, step, sample and element"
CALLS: Sequence[tuple[Any, str, str, str]] = (  # (owner, name, what would be wrong, what to do)
    (torch.autograd.graph.saved_tensors_hooks, "__enter__", "hooks on what autograd saves would not run",
     "leave them out: torch.utils.checkpoint saves memory here too"),
    (torch.Tensor, "register_hook", "a hook on a value would not run", NO_HOOKS),
    (torch.Tensor, "register_post_accumulate_grad_hook", "a hook on a gradient would not run", NO_HOOKS),
    (torch.Tensor, "retain_grad", "retain_grad has nothing to keep: gradients of values stay on the chips",
     "leave it out"),
    (torch.autograd.graph, "register_multi_grad_hook", "a hook on gradients would not run", NO_HOOKS),
    *((nn.Module, name, "a backward hook would not run", NO_HOOKS) for name in MODULE_HOOKS),
    (torch.autograd, "backward", "the forward computes gradients itself", BY_HAND),
    (torch.autograd, "grad", "the forward computes gradients itself", BY_HAND),
    (torch.autograd.forward_ad, "enter_dual_level", "the forward computes derivatives itself", BY_HAND),
    (torch._functorch.eager_transforms, "grad_increment_nesting", "the forward computes gradients itself", BY_HAND),
    (torch._functorch.eager_transforms, "jvp_increment_nesting", "the forward computes derivatives itself", BY_HAND),
    *((owner, name, "the forward seeds torch's generator, by which nothing is drawn on chips", SEEDED)
      for owner in (torch, torch.random) for name in SEEDS if hasattr(owner, name)),
    (torch._functorch.apis, "vmap_impl", "vmap cannot be captured", "give the function a batch dim: most take one"),
)  # fmt: skip
NO_GRADIENTS = "gradients are not there in a forward; keep what is needed of them in the optimizer"
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class OpenCall(Protocol):
    """A call of a submodule."""

    path: str


@contextmanager
def explaining(module: nn.Module, open_calls: Sequence[OpenCall]) -> Iterator[None]:
    """Turn a failure inside a trace into a CaptureError that names the operator, the user's line and the submodule."""
    try:
        yield
    except Exception as error:
        where = in_module(first_user_line(error), open_calls[-1].path if open_calls else "")
        if isinstance(error, CaptureError):
            error.where = error.where or where
            raise
        operator = str(getattr(error, "func", "")) or str(error).strip().split("\n")[0][:200]
        problem = f"cannot capture {type(module).__name__}: {type(error).__name__} at {operator}"
        hint = "see whether model and loss take such a batch by themselves; if so, write this line otherwise"
        if "dynamo" in operator:
            hint = "leave torch.compile out: a plan is compiled by itself"
        raise CaptureError(problem, where, instead_of(error, hint)) from error


def instead_of(error: Exception, hint: str) -> str:
    """What to write instead of an operator that asks for values; `hint` where it failed for another reason."""
    if not isinstance(error, OF_VALUES):
        return hint
    return next((said for name, said in INSTEAD.items() if name in str(error)), BY_VALUES)


@contextmanager
def users_warnings(said: set[str], is_whole: bool) -> Iterator[None]:
    """Each warning of the forward once, and only of the whole batch: others come of shapes that are tried."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for found in caught if is_whole else ():
        if str(found.message) not in said:
            said.add(str(found.message))
            warnings.warn_explicit(found.message, found.category, found.filename, found.lineno)


def refuse_unsupported(module: nn.Module) -> None:
    """Refuse wrappers that split the batch themselves, and hooks that would not run. Raises CaptureError."""
    for name, child in module.named_modules():
        where = f"{name or type(module).__name__} ({type(child).__name__})"
        if isinstance(child, WRAPPERS):
            problem = (
                f"{type(child).__name__} splits batches and adds gradients itself, as the plan's dp does"
            )
            raise CaptureError(problem, where, "pass the module in it: model.module")
        if isinstance(child, torch.jit.ScriptModule) or "_orig_mod" in child._modules:
            is_scripted = isinstance(child, torch.jit.ScriptModule)
            problem = (
                f"the module is {'scripted' if is_scripted else 'compiled'}, as which it cannot be captured"
            )
            hint = (
                "pass it as it was before torch.jit"
                if is_scripted
                else "pass the module in it: model._orig_mod"
            )
            raise CaptureError(problem, where, hint)
        if (
            isinstance(child, _BatchNorm)
            and child.training
            and child.track_running_stats
            and child.momentum is None
        ):
            problem = "running averages with momentum=None go by a count, which is not known at a capture"
            raise CaptureError(problem, where, "give it a momentum: 0.1 is torch's own")
        if child._backward_hooks or child._backward_pre_hooks:
            raise CaptureError("a backward hook would not run", where, "remove the hook")
        for own, param in child.named_parameters(recurse=False):
            if is_lazy(param):
                problem = f"{own} has no shape before the first forward"
                raise CaptureError(problem, where, "call the model once before")
            if param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
                raise CaptureError("a gradient hook would not run", f"{where}: {own}", "remove the hook")
        for own, value in (*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)):
            if not is_plain_kind(value):
                problem = f"{own} is a {type(value).__name__}, whose own code would not run"
                raise CaptureError(problem, f"{where}: {own}", "make it an nn.Parameter or a plain tensor")
            if value.layout is not torch.strided or value.is_quantized:
                kind, hint = ("quantized", "dequantize()") if value.is_quantized else ("sparse", "to_dense()")
                raise CaptureError(f"{own} is {kind}", f"{where}: {own}", f"make it dense: {hint}")


def refuse_operator(node: torch.fx.Node) -> None:
    """Refuse what makes or reads tensors that are not stored entry by entry, or writes what its schema does not say.
    Raises CaptureError."""
    if op_name(node.target) in WRITING_NORMS and node.args[3] is not None and node.args[5]:
        problem = f"{op_name(node.target)} writes running statistics, which its schema does not say"
        raise CaptureError(problem, source_line(node), "use nn.functional.batch_norm")
    if "_fq_helper" in op_name(node.target) or op_name(node.target) == "fused_moving_avg_obs_fake_quant":
        lowest = node.args[3]
        if isinstance(lowest, torch.fx.Node) and not lowest.meta["val"].numel():
            problem = "the first forward makes buffers of quantization as long as there are channels"
            raise CaptureError(problem, source_line(node), "call the model once before, on any batch")
    at = SPARSE_AT.get(op_name(node.target), len(node.args))
    if node.args[at : at + 1] == (True,):
        raise CaptureError("sparse gradients are not supported", source_line(node), "use sparse=False")
    layout = getattr(node.meta.get("val"), "layout", torch.strided)
    if layout is not torch.strided or "sparse" in op_name(node.target):
        problem = f"{op_name(node.target)} makes or reads a sparse tensor"
        raise CaptureError(problem, source_line(node), "use dense ones, or index_add for sums over edges")


def refusing(problem: str, hint: str) -> Callable[..., NoReturn]:
    """What raises it when it is called; the place is added on the way up."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise CaptureError(problem, hint=hint)

    return refuse


@contextmanager
def refused_calls() -> Iterator[None]:
    """While a forward is traced, what no graph can hold is refused."""
    refusals = [(owner, name, refusing(problem, hint)) for owner, name, problem, hint in CALLS]
    with replaced([*refusals, (TorchDispatchMode, "__enter__", _entered)]), _gradients_refused():
        yield


def _entered(mode: TorchDispatchMode, own: Callable[..., Any] = TorchDispatchMode.__enter__) -> Any:
    """Modes of torch are its own business; what those of others do to operators is not seen in a graph."""
    if type(mode).__module__.partition(".")[0] not in ("torch", "partitioner", "orchestrator"):
        problem = f"{type(mode).__name__} changes what operators do, which would not be seen"
        raise CaptureError(problem, hint="take a TorchFunctionMode, or call what it does")
    return own(mode)


@contextmanager
def _gradients_refused() -> Iterator[None]:
    """Code outside of torch that reads `.grad` of a value of the graph is refused."""
    own: Any = torch._C.TensorBase.grad
    refuse = refusing("the forward reads .grad", NO_GRADIENTS)

    def read(value: torch.Tensor) -> Any:
        frame: Any = sys._getframe(1)
        asks = (frame.f_back if frame.f_code.co_name == READER else frame).f_code.co_filename
        return refuse() if is_users(asks) and _node_of(value) is not None else own.__get__(value)

    def write(value: torch.Tensor, new: torch.Tensor | None) -> None:
        if new is not None and is_users(sys._getframe(1).f_code.co_filename):
            refusing("the forward or a backward sets .grad", NO_GRADIENTS)()
        own.__set__(value, new)

    with patch.object(torch.Tensor, "grad", property(read, write, own.__delete__), create=True):
        yield


def _node_of(value: torch.Tensor) -> torch.fx.Node | None:
    """The node of the graph that is being traced that makes a value, if one does."""
    mode = get_proxy_mode()
    if mode is None:
        return None
    assert isinstance(mode.tracer, PythonKeyTracer)
    inner = value.from_functional() if isinstance(value, FunctionalTensor) else value
    proxy = mode.tracer.unwrap_proxy(inner)
    return proxy.node if isinstance(proxy, torch.fx.Proxy) else None
