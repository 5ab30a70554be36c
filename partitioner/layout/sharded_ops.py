"""Tensor-parallel forms of the operations that DTensor would bake a chip's own offset into.

Each takes the chip's coordinate as a tensor, so one trace serves every chip of a role:
- embedding with the vocabulary cut (Shoeybi et al. 2019, section 3),
- cross entropy over vocabulary-cut logits: three small all-reduces instead of gathering the logits,
- the slice that turns a replicated tensor into a shard (patched into DTensor's placement while tracing).
CPU flash attention has no DTensor rule; it gets one here: heads may be cut.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.utils._pytree import tree_leaves

import kernels.ops  # noqa: F401  (registers orchestrate::shard_slice)
from partitioner.capture.captured_graph import op_name
from partitioner.capture.fused_projections import project

aten = torch.ops.aten
NO_PADDING = -1
SUM = 2  # torch's code of the reduction


def all_reduce(x: torch.Tensor, reduction: str, mesh: DeviceMesh) -> torch.Tensor:
    """Functional all-reduce over the tp axis, visible in the trace."""
    started = torch.ops._c10d_functional.all_reduce(x, reduction, mesh.get_group().group_name)
    return torch.ops._c10d_functional.wait_tensor(started)


def vocab_embedding(
    weight: DTensor, ids: torch.Tensor, coordinate: torch.Tensor, padding_idx: int = NO_PADDING
) -> DTensor:
    """Rows of a vocabulary-cut table: [.., hidden], zero where another chip holds the row, then summed.

    The row of `padding_idx` gets no gradient, as in `torch.nn.Embedding`.
    """
    local = weight.to_local(grad_placements=weight.placements)
    index = ids - coordinate * local.shape[0]
    held = (index >= 0) & (index < local.shape[0])
    rows = torch.nn.functional.embedding(torch.where(held, index, 0), local)
    rows = rows * held.unsqueeze(-1).to(rows.dtype)
    if padding_idx != NO_PADDING:
        rows = torch.where((ids == padding_idx).unsqueeze(-1), rows.detach(), rows)
    return DTensor.from_local(_SumForward.apply(rows, weight.device_mesh), weight.device_mesh, [Replicate()])


# Operators that DTensor is known to carry out right on cut operands, besides pointwise ones. The others get whole ones:
# of a mean, say, it would divide a shard's gradient by the shard's length.
CUTTABLE = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "transpose",
        "permute",
        "t",
        "expand",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "getitem",
        "cat",
        "stack",
        "contiguous",
        "clone",
        "to",
        "_to_copy",
        "alias",
        "detach",
        "where",
        "masked_fill",
        "dropout",
        "matmul",
        "mm",
        "bmm",
        "linear",
        "addmm",
        "softmax",
        "log_softmax",
        "scaled_dot_product_attention",
        "layer_norm",
        "sum",
        "embedding",
        "cross_entropy_loss",
    ]
)


def may_be_cut(target: object) -> bool:
    """Whether an operator's operands may stay cut along tp."""
    if op_name(target) in CUTTABLE:
        return True
    is_pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return is_pointwise and _has_rule(target) and _has_rule(f"{op_name(target)}_backward")


def _has_rule(target: object) -> bool:
    """Whether DTensor has a rule for an operator, or for all of that name, if there are any."""
    known = DTensor._op_dispatcher.sharding_propagator
    if isinstance(target, str):
        packet = getattr(aten, target, None)
        names = [] if packet is None else [n for n in packet.overloads() if n not in ("out", "grad_input")]
        return all(_has_rule(getattr(packet, name)) for name in names)
    rules = (
        getattr(known, name, {})
        for name in ("op_strategy_funcs", "op_to_rules", "op_single_dim_strategy_funcs")
    )
    return any(target in each for each in rules)


def any_cut(arguments: Any) -> bool:
    """Whether an argument is cut, or a sum that is not yet made."""
    return any(
        isinstance(leaf, DTensor) and leaf.placements[0] != Replicate() for leaf in tree_leaves(arguments)
    )


def any_interleaved(results: Any) -> bool:
    """Whether a result lies in pieces on a chip (a flattened inner dim): what slices it again takes one range."""
    return any(
        isinstance(leaf, DTensor) and not isinstance(leaf.placements[0], Replicate | Shard | Partial)
        for leaf in tree_leaves(results)
    )


def is_cut(value: object, dim: int) -> bool:
    """True for a DTensor cut along `dim`."""
    return (
        isinstance(value, DTensor)
        and isinstance(value.placements[0], Shard)
        and value.placements[0].dim == dim
    )


def cut_matmul(target: object, args: Sequence[Any], entered: dict[int, torch.Tensor]) -> DTensor | None:
    """A matmul whose weight is cut, in Megatron's two forms; None when it is not one.

    Column: the whole input times a slice of the outputs, gradient of the input summed over chips. Row: a slice of
    the input times a slice of the weight, products summed over chips, bias added once. DTensor would choose among
    layouts by a cost of its own, and for the backward often moves weights instead. `entered` remembers inputs
    already handed to column-wise weights: query, key and value then share one all-reduce in the backward.
    """
    if target is aten.linear.default:
        x, weight, bias, out_dim = args[0], args[1], args[2] if len(args) > 2 else None, 0
    elif target is aten.addmm.default:
        x, weight, bias, out_dim = args[1], args[2], args[0], 1
    elif target in (aten.mm.default, aten.matmul.default):
        x, weight, bias, out_dim = args[0], args[1], None, 1
    else:
        return None
    if not isinstance(weight, DTensor) or weight.dim() != 2 or not isinstance(weight.placements[0], Shard):
        return None
    mesh, last = weight.device_mesh, x.dim() - 1
    if weight.placements[0].dim == out_dim:
        if id(x) not in entered:
            entered[id(x)] = _SumBackward.apply(_placed(x, Replicate()).to_local(), mesh)
        local = entered[id(x)]
        result = DTensor.from_local(_times(local, weight, out_dim), mesh, [Shard(last)], run_check=False)
    else:
        local = _placed(x, Shard(last)).to_local()
        partial = DTensor.from_local(_times(local, weight, out_dim), mesh, [Partial()], run_check=False)
        result = partial.redistribute(placements=[Replicate()])
    return result if bias is None else result + bias


def cut_projection(args: Sequence[Any], entered: dict[int, torch.Tensor]) -> DTensor:
    """`project` with a cut dim of features: each chip makes its own, from the whole input."""
    x, weight, bias, is_out_first = args
    mesh, placement = weight.device_mesh, weight.placements[0]
    if id(x) not in entered:
        entered[id(x)] = _SumBackward.apply(_placed(x, Replicate()).to_local(), mesh)
    is_cut_here = isinstance(placement, Shard)
    local = entered[id(x)] if is_cut_here else _placed(x, Replicate()).to_local()
    own = weight.to_local(grad_placements=weight.placements)
    added = None if bias is None else bias.to_local(grad_placements=bias.placements)
    made = project(local, own, added, is_out_first)
    if not isinstance(placement, Shard):
        return DTensor.from_local(made, mesh, [Replicate()], run_check=False)
    dim = x.dim() - 1 + placement.dim - (0 if is_out_first else 1)
    return DTensor.from_local(made, mesh, [Shard(dim)], run_check=False)


def _placed(x: DTensor, placement: Replicate | Shard) -> DTensor:
    """`x` in `placement`; untouched if it is there already."""
    return x if x.placements[0] == placement else x.redistribute(placements=[placement])


def _times(x: torch.Tensor, weight: DTensor, out_dim: int) -> torch.Tensor:
    local = weight.to_local(grad_placements=weight.placements)
    return torch.nn.functional.linear(x, local) if out_dim == 0 else x @ local


class _SumBackward(torch.autograd.Function):
    """The identity whose gradient is summed over the tp axis (Megatron's f)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(grads[0], "sum", ctx.mesh), None


class _SumForward(torch.autograd.Function):
    """All-reduce whose gradient is the identity: every chip receives the whole gradient already."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        return all_reduce(x, "sum", mesh)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def is_plain_sum(args: Sequence[Any]) -> bool:
    """Whether the arguments of a cross entropy ask for what `vocab_cross_entropy` computes: an unweighted sum."""
    weight, reduction, smoothing = args[2:3], args[3:4], args[5:6]
    return tuple(weight) in ((), (None,)) and tuple(reduction) == (SUM,) and tuple(smoothing) in ((), (0.0,))


def vocab_cross_entropy(
    logits: DTensor, target: torch.Tensor, coordinate: torch.Tensor, ignore_index: int
) -> DTensor:
    """Sum of token losses for [tokens, vocab] logits cut along vocab; target is [tokens], whole on every chip."""
    local = logits.to_local(grad_placements=logits.placements)
    total = _VocabCrossEntropy.apply(local, target, coordinate, ignore_index, logits.device_mesh)
    return DTensor.from_local(total, logits.device_mesh, [Replicate()])


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        coordinate: torch.Tensor,
        ignore: int,
        mesh: DeviceMesh,
    ) -> torch.Tensor:
        width = logits.shape[-1]
        shifted = logits - all_reduce(logits.amax(-1), "max", mesh).unsqueeze(-1)
        exponentials = shifted.exp()
        index = target - coordinate * width
        held = (index >= 0) & (index < width)
        index = torch.where(held, index, 0).unsqueeze(-1)
        picked = shifted.gather(-1, index).squeeze(-1) * held.to(logits.dtype)
        sums = all_reduce(torch.stack([exponentials.sum(-1), picked]), "sum", mesh)
        counted = (target != ignore).to(logits.dtype)
        ctx.save_for_backward(exponentials / sums[0].unsqueeze(-1), index, held, counted)
        return ((sums[0].log() - sums[1]) * counted).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        softmax, index, held, counted = ctx.saved_tensors
        grad = softmax.scatter_add(-1, index, -held.to(softmax.dtype).unsqueeze(-1))
        return grad * (counted * grads[0]).unsqueeze(-1), None, None, None, None


@contextmanager
def coordinate_slices(coordinate: torch.Tensor) -> Iterator[None]:
    """While tracing, a tensor becomes a shard through `shard_slice`, not at a constant offset."""
    original, original_move = Shard._replicate_to_shard, Shard._to_new_shard_dim

    def replicate_to_shard(
        self: Shard, local: torch.Tensor, mesh: DeviceMesh, mesh_dim: int, _: object
    ) -> torch.Tensor:
        if local.shape[self.dim] % mesh.size(mesh_dim=mesh_dim):
            raise ValueError(f"{local.shape[self.dim]} does not divide by {mesh.size(mesh_dim=mesh_dim)}")
        return torch.ops.orchestrate.shard_slice(local, self.dim, coordinate, mesh.size(mesh_dim=mesh_dim))

    def to_new_shard_dim(
        self: Shard, local: torch.Tensor, mesh: DeviceMesh, mesh_dim: int, shape: Sequence[int], new_dim: int
    ) -> torch.Tensor:
        whole = self._to_replicate_tensor(local, mesh, mesh_dim, shape)
        return replicate_to_shard(Shard(new_dim), whole, mesh, mesh_dim, None)

    Shard._replicate_to_shard = replicate_to_shard  # type: ignore[method-assign,assignment]
    Shard._to_new_shard_dim = to_new_shard_dim  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Shard._replicate_to_shard = original  # type: ignore[method-assign]
        Shard._to_new_shard_dim = original_move  # type: ignore[method-assign]


def _attention_rule(num_results: int, num_tensors: int) -> Callable[..., list[Any]]:
    """Heads may be cut, alike in every result and in the tensors, which come first among the arguments."""

    def rule(*args: Any, **named: Any) -> list[Any]:
        rest = [None] * (len(args) + len(named) - num_tensors)
        cuts = (Replicate(), Shard(1))
        return [([cut] * num_results, [cut] * num_tensors + rest) for cut in cuts]

    return rule


def register_attention_rules() -> None:
    """Teach DTensor the CPU flash attention operators (idempotent)."""
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    # query, key, value -> output, logsumexp; and grad with these five -> three gradients
    register_sharding(forward)(_attention_rule(2, 3))
    register_sharding(backward)(_attention_rule(3, 6))
