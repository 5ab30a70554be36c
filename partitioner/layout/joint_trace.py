"""Joint tracing: one unit's forward and backward as the local graph of one chip.

The unit's global graph is interpreted with DTensor operands on a fake process group and recorded by `make_fx`, so
what comes out is local ATen ops with explicit functional collectives (GSPMD with PyTorch's own propagation).
Only the tp axis is given to DTensor; data parallelism, ZeRO and pipelining are added when lowering. With tp = 1
the same interpreter runs on plain tensors.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map_only

from comms.errors import PartitionError
from partitioner.capture.captured_graph import TORCH, Template
from partitioner.capture.fused_projections import project
from partitioner.capture.pure_graph import trace_values
from partitioner.capture.recomputing import Recomputing, as_when_run
from partitioner.capture.tp_styles import shard_dim
from partitioner.layout import part_ops, sharded_ops
from partitioner.layout.sharded_ops import is_cut
from partitioner.program.program import TensorSpec

aten = torch.ops.aten
SPLITTING_VIEWS = {aten.view.default, aten.reshape.default, aten.unflatten.int}


@dataclass(frozen=True)
class Joint:
    """A traced unit.

    Placeholders of `graph`, in order: params, frees, activations, the tp coordinate, one tangent per
    live output. Results: the unit's outputs, then one gradient per entry of `wanted`.
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


def trace_joint(template: Template, dims: Sequence[int | None], mesh: DeviceMesh | None) -> Joint:
    """Trace one template; `dims[i]` is where tp cuts parameter i."""
    tp = mesh.size() if mesh else 1
    dims = [*dims, *[None] * (len(template.inputs) - len(dims))]  # what is no parameter is replicated
    with FakeTensorMode(allow_non_fake_inputs=True):
        locals_ = [_empty(spec, dim, tp) for spec, dim in zip(template.inputs, dims, strict=True)]
        coordinate = torch.zeros((), dtype=torch.int64)
        differentiable = [i for i, is_live in enumerate(template.live_outputs) if is_live]
        tangents = [_empty(template.outputs[i]) for i in differentiable]
    wanted = [i for i, is_live in enumerate(template.live_inputs) if is_live]

    def joint(*flat: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, coordinate, seeds = list(flat[: len(locals_)]), flat[len(locals_)], flat[len(locals_) + 1 :]
        for index in wanted:  # leaves of their own: gradients end here, at the unit's border
            inputs[index] = inputs[index].detach().requires_grad_()
        slices = sharded_ops.coordinate_slices(coordinate) if mesh else nullcontext()
        with torch.enable_grad(), as_when_run(), slices:
            outputs = _forward(template, inputs, dims, mesh, coordinate)
            sources = [inputs[i] for i in wanted]
            with_grad = [
                (outputs[i], seed)
                for i, seed in zip(differentiable, seeds, strict=True)
                if outputs[i].requires_grad
            ]
            grads = _gradients(with_grad, sources)
        # in order at the border: what reads them was traced so, and some operators ask for it
        return (
            *(o.detach().contiguous() for o in outputs),
            *(g if g is None else g.contiguous() for g in grads),
        )

    with _explained(tp):
        values = (*locals_, coordinate, *tangents)
        traced = trace_values(joint, values)
    return Joint(traced.graph, len(locals_), len(template.outputs), tuple(differentiable), tuple(wanted))


@contextmanager
def _explained(tp: int) -> Iterator[None]:
    """Turn a failure inside the trace into a PartitionError that names the operator."""
    try:
        yield
    except PartitionError:
        raise
    except Exception as error:
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


class _Sharded(Recomputing):
    """Runs a unit's graph; replaces what must not depend on the chip's own coordinate."""

    def __init__(
        self, module: torch.fx.GraphModule, mesh: DeviceMesh | None, coordinate: torch.Tensor
    ) -> None:
        super().__init__(module)
        self.mesh, self.coordinate = mesh, coordinate
        self.entered: dict[int, torch.Tensor] = {}

    @contextmanager
    def _inside(self, values: Mapping[torch.fx.Node, Any]) -> Iterator[None]:
        before, self.entered = self.entered, {}  # by identity: of values that live as long
        try:
            with super()._inside(values):
                yield
        finally:
            self.entered = before

    def run_node(self, n: torch.fx.Node) -> Any:
        with ExitStack() as modes:
            if n.meta.get("no_grad"):
                modes.enter_context(torch.no_grad())
            if autocast := n.meta.get("autocast"):
                device, dtype, enabled = autocast
                modes.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
            if n.op == "call_function" and n.args and isinstance(n.args[0], torch.fx.Node):
                source: Any = self.env.get(n.args[0])
                if not self._may_split(n.target, source, n):
                    self.env[n.args[0]] = self._everywhere(_whole(source))
            return super().run_node(n)

    def _may_split(self, target: Any, value: Any, node: torch.fx.Node) -> bool:
        """Whether a view may split the dim that tp cuts: its outermost part must divide."""
        result = node.meta.get("val")
        if self.mesh is None or target not in SPLITTING_VIEWS or not isinstance(value, DTensor):
            return True
        placement = value.placements[0]
        if not isinstance(placement, Shard) or not isinstance(result, torch.Tensor):
            return True
        before = prod(value.shape[: placement.dim])
        for dim, size in enumerate(result.shape):
            if prod(result.shape[:dim]) == before and size > 1:
                return size % self.mesh.size() == 0
        return False

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._everywhere(value) if self.mesh else value

    def _keyed(self, key: Any, first: Any, like: Any, *rest: Any) -> Any:
        """Random numbers for `like`: all of them on every chip, which then takes its own."""
        drawn = self._everywhere(torch.ops.orchestrate.keyed_uniform(_whole(key), _whole(first), None, *rest))
        is_cut = isinstance(like, DTensor) and isinstance(like.placements[0], Shard)
        return drawn.redistribute(placements=like.placements) if is_cut else drawn

    def _everywhere(self, value: torch.Tensor) -> DTensor:
        assert self.mesh is not None
        return DTensor.from_local(value, self.mesh, [Replicate()], run_check=False)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        between_parts = part_ops.BETWEEN_PARTS.get(target)
        if between_parts is not None:
            if self.mesh is None:
                return between_parts(*args)
            return self._everywhere(between_parts(_whole(args[0]), *args[1:]))
        if target is torch.ops.orchestrate.keyed_uniform.default and self.mesh is not None:
            return self._keyed(*args)
        if self.mesh is not None:
            if target is aten.embedding.default and is_cut(args[0], 0):
                return sharded_ops.vocab_embedding(args[0], args[1].to_local(), self.coordinate, *args[2:3])
            if target is aten.cross_entropy_loss.default and is_cut(args[0], args[0].dim() - 1):
                if not sharded_ops.is_plain_sum(args):
                    whole = args[0].redistribute(placements=[Replicate()])
                    return super().call_function(target, (whole, *args[1:]), kwargs)
                ignore = args[4] if len(args) > 4 else -100
                return sharded_ops.vocab_cross_entropy(args[0], _whole(args[1]), self.coordinate, ignore)
            if target is project:
                return sharded_ops.cut_projection(args, self.entered)
            matmul = sharded_ops.cut_matmul(target, args, self.entered) if not kwargs else None
            if matmul is not None:
                return matmul
            if not sharded_ops.may_be_cut(target) or not sharded_ops.any_cut((args, kwargs)):
                return self._on_whole(target, args, kwargs)
            try:
                result = super().call_function(target, args, kwargs)
            except (
                Exception
            ):  # whatever DTensor cannot do with cut operands: nobody reads what was traced of it
                return self._on_whole(target, args, kwargs)
            return self._on_whole(target, args, kwargs) if sharded_ops.any_interleaved(result) else result
        return super().call_function(target, args, kwargs)

    def _on_whole(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The operation on whole operands, on every chip."""
        args, kwargs = tree_map_only(DTensor, _whole, (args, kwargs))
        return tree_map_only(torch.Tensor, self._everywhere, super().call_function(target, args, kwargs))


def _whole(value: DTensor) -> torch.Tensor:
    return value.redistribute(placements=[Replicate()]).to_local()
