"""Joint tracing: one unit's forward and backward as the local graph of one chip.

The unit's global graph is interpreted with DTensor operands on a fake process group and recorded by `make_fx`, so
what comes out is local ATen ops with explicit functional collectives (GSPMD with PyTorch's own propagation).
Only the tp axis is given to DTensor; data parallelism, ZeRO and pipelining are added when lowering. With tp = 1
the same interpreter runs on plain tensors.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from comms.errors import PartitionError
from partitioner.capture.captured_graph import TORCH, Template
from partitioner.capture.tp_styles import shard_dim
from partitioner.layout import sharded_ops
from partitioner.layout.sharded_ops import is_cut
from partitioner.program.program import TensorSpec

aten = torch.ops.aten
SPLITTING_VIEWS = {aten.view.default, aten.reshape.default, aten.unflatten.int}


@dataclass(frozen=True)
class Joint:
    """A traced unit.

    Placeholders of `graph`, in order: params, frees, activations, the tp coordinate, one tangent per
    differentiable output. Results: the unit's outputs, then one gradient per entry of `wanted`.
    """

    graph: torch.fx.Graph
    num_inputs: int
    num_outputs: int
    tangents: tuple[int, ...]
    wanted: tuple[int, ...]


@contextmanager
def tensor_parallel_mesh(tp: int) -> Iterator[DeviceMesh | None]:
    """A mesh of `tp` imaginary chips (None when tp is 1), gone when the block ends."""
    if tp == 1:
        yield None
        return
    if dist.is_initialized():
        raise PartitionError("torch.distributed is already initialised", "this process",
                           "partition before init_process_group")  # fmt: skip
    hook = sys.excepthook  # torch puts a rank before every line of a traceback, and leaves it there
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
    try:
        sharded_ops.register_attention_rules()
        yield DeviceMesh("cpu", list(range(tp)), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def param_dims(template: Template) -> tuple[int | None, ...]:
    """For each parameter of the template, the dim that tp cuts (None: replicated)."""
    placeholders = [n for n in template.graph.graph.nodes if n.op == "placeholder"]
    dims: list[int | None] = []
    for param, style in zip(placeholders, template.tp_styles, strict=False):
        found = {shard_dim(style, user, param) for user in param.users}
        dims.append(found.pop() if len(found) == 1 else None)
    return tuple(dims)


def trace_joint(
    template: Template,
    dims: Sequence[int | None],
    mesh: DeviceMesh | None,
    frozen: Sequence[bool],
    first: bool,
) -> Joint:
    """Trace one template; `dims[i]` is where tp cuts parameter i, `first`: no gradient for the activations."""
    tp = mesh.size() if mesh else 1
    dims = [*dims, *[None] * (len(template.inputs) - len(dims))]  # what is no parameter is replicated
    with FakeTensorMode(allow_non_fake_inputs=True):
        locals_ = [_empty(spec, dim, tp) for spec, dim in zip(template.inputs, dims, strict=True)]
        coordinate = torch.zeros((), dtype=torch.int64)
        differentiable = [i for i, spec in enumerate(template.outputs) if spec.is_float]
        tangents = [_empty(template.outputs[i]) for i in differentiable]
    wanted = _wanted(template, frozen, first)

    def joint(*flat: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, coordinate, seeds = list(flat[: len(locals_)]), flat[len(locals_)], flat[len(locals_) + 1 :]
        for index in wanted:  # leaves of their own: gradients end here, at the unit's border
            inputs[index] = inputs[index].detach().requires_grad_()
        with torch.enable_grad(), sharded_ops.coordinate_slices(coordinate) if mesh else nullcontext():
            outputs = _forward(template, inputs, dims, mesh, coordinate)
            sources = [inputs[i] for i in wanted]
            with_grad = [
                (outputs[i], seed)
                for i, seed in zip(differentiable, seeds, strict=True)
                if outputs[i].requires_grad
            ]
            grads = _gradients(with_grad, sources)
        return (*(o.detach() for o in outputs), *grads)

    with _explained(tp):
        traced = make_fx(joint, tracing_mode="real", _allow_non_fake_inputs=True)(
            *locals_, coordinate, *tangents
        )
    return Joint(traced.graph, len(locals_), len(template.outputs), tuple(differentiable), tuple(wanted))


@contextmanager
def _explained(tp: int) -> Iterator[None]:
    """Turn a failure inside the trace into a PartitionError that names the operator."""
    try:
        yield
    except PartitionError:
        raise
    except RuntimeError as error:
        first = str(error).strip().split("\n")[0]
        raise PartitionError(
            f"cannot cut the model by tp {tp}: {first}",
            "tensor parallelism",
            "use another tp, or give the model a tp_plan that replicates this part",
        ) from error


def _gradients(
    outputs: Sequence[tuple[torch.Tensor, torch.Tensor]], sources: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of `sources` for (output, tangent) pairs; None where nothing flows."""
    if not outputs or not sources:
        return (None,) * len(sources)
    # one call for all outputs: what they share is differentiated once
    return torch.autograd.grad([o for o, _ in outputs], sources, [t for _, t in outputs], allow_unused=True)


def _empty(spec: TensorSpec, dim: int | None = None, tp: int = 1) -> torch.Tensor:
    shape = list(spec.shape)
    if dim is not None:
        shape[dim] //= tp
    return torch.empty(shape, dtype=TORCH[spec.dtype])


def _wanted(template: Template, frozen: Sequence[bool], first: bool) -> list[int]:
    """Inputs that need gradients: trainable parameters, and activations unless nothing comes before them."""
    num_params, start = template.num_params, template.num_params + template.num_frees
    floats = [spec.is_float for spec in template.inputs]
    params = [i for i in range(num_params) if floats[i] and not frozen[i]]
    activations = [] if first else [i for i in range(start, len(template.inputs)) if floats[i]]
    return params + activations


def _forward(
    template: Template,
    inputs: Sequence[torch.Tensor],
    dims: Sequence[int | None],
    mesh: DeviceMesh | None,
    coordinate: torch.Tensor,
) -> list[torch.Tensor]:
    interpreter = _Sharded(template.graph, mesh, coordinate)
    if mesh is None:
        return list(interpreter.run(*inputs))
    placed = [
        DTensor.from_local(x, mesh, [Replicate() if dim is None else Shard(dim)], run_check=False)
        for x, dim in zip(inputs, dims, strict=True)
    ]
    # whole at the border, so that units can be cut apart without knowing how their neighbours are laid out
    return [_whole(output) for output in interpreter.run(*placed)]


class _Sharded(torch.fx.Interpreter):
    """Runs a unit's graph; replaces what must not depend on the chip's own coordinate."""

    def __init__(
        self, module: torch.fx.GraphModule, mesh: DeviceMesh | None, coordinate: torch.Tensor
    ) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.mesh, self.coordinate = mesh, coordinate
        self.entered: dict[int, torch.Tensor] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        self._require_whole_heads(n)
        if n.meta.get("no_grad"):
            with torch.no_grad():
                return super().run_node(n)
        return super().run_node(n)

    def _require_whole_heads(self, node: torch.fx.Node) -> None:
        """Refuse a view that splits a cut dim into (heads, width) where the heads do not divide."""
        source = self.env.get(node.args[0]) if node.args and isinstance(node.args[0], torch.fx.Node) else None
        result = node.meta.get("val")
        if self.mesh is None or node.target not in SPLITTING_VIEWS or not isinstance(source, DTensor):
            return
        if not isinstance(result, torch.Tensor):
            return
        last = source.dim() - 1
        splits = result.dim() > source.dim() and result.shape[:last] == source.shape[:last]
        if is_cut(source, last) and splits and result.shape[last] % self.mesh.size():
            raise PartitionError(
                f"{result.shape[last]} heads do not divide by tp {self.mesh.size()}", str(node.target),
                f"use a tp that divides {result.shape[last]}",
            )  # fmt: skip

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return DTensor.from_local(value, self.mesh, [Replicate()], run_check=False) if self.mesh else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.mesh is not None:
            if target is aten.embedding.default and is_cut(args[0], 0):
                return sharded_ops.vocab_embedding(args[0], args[1].to_local(), self.coordinate, *args[2:3])
            if target is aten.cross_entropy_loss.default and is_cut(args[0], args[0].dim() - 1):
                if not sharded_ops.is_plain_sum(args):
                    whole = args[0].redistribute(placements=[Replicate()])
                    return super().call_function(target, (whole, *args[1:]), kwargs)
                ignore = args[4] if len(args) > 4 else -100
                return sharded_ops.vocab_cross_entropy(args[0], _whole(args[1]), self.coordinate, ignore)
            matmul = sharded_ops.cut_matmul(target, args, self.entered) if not kwargs else None
            if matmul is not None:
                return matmul
        return super().call_function(target, args, kwargs)


def _whole(value: DTensor) -> torch.Tensor:
    return value.redistribute(placements=[Replicate()]).to_local()
