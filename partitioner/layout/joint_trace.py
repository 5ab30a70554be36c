"""Joint tracing: one unit's forward and backward as the local graph of one chip.

The unit's global graph is interpreted on what one chip holds, by the rules of `cut_rules` and its neighbours, and
recorded by `make_fx`, so what comes out is local ATen ops with explicit functional collectives (Xu et al. 2021, GSPMD).
Data parallelism, ZeRO and pipelining are added when lowering. With tp = 1 the same interpreter runs on plain tensors.
"""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from comms.errors import PartitionError, first_sentence
from kernels.backend import NEED_ORDER
from partitioner.capture.captured_graph import TORCH, Template, op_name
from partitioner.capture.forwards.user_functions import AppliedFunction
from partitioner.capture.pure_graph import quiet_torch, trace_values, unfused
from partitioner.capture.recomputing import Recomputing, as_when_run
from partitioner.capture.source_lines import line_of
from partitioner.capture.type_questions import spaces_from, types_as_in_training
from partitioner.layout import part_ops
from partitioner.layout.cut_operations import cut_result
from partitioner.layout.cut_products import PRODUCT_RULES
from partitioner.layout.cut_rules import CutCall
from partitioner.layout.cut_values import CutTensor, TpGroup, is_any_cut
from partitioner.layout.param_cuts import ParamCut
from partitioner.program.program import TensorSpec

VIEWS = ("view", "_unsafe_view")


@dataclass(frozen=True)
class Joint:
    """A traced unit.

    Placeholders of `graph`, in order: params, frees, activations, the tp coordinate, one tangent per
    live output. Results: the unit's outputs, then one gradient per entry of `wanted`. `whole`: products that every
    chip makes, and why.
    """

    graph: torch.fx.Graph
    num_inputs: int
    num_outputs: int
    tangents: tuple[int, ...]
    wanted: tuple[int, ...]
    whole: tuple[str, ...] = ()


def trace_joint(template: Template, cuts: Sequence[ParamCut | None], tp: int) -> Joint:
    """Trace one template; `cuts[i]` is where tp cuts parameter i."""
    cuts = [*cuts, *[None] * (len(template.inputs) - len(cuts))]  # what is no parameter is whole
    with FakeTensorMode(allow_non_fake_inputs=True):
        locals_ = [
            _empty(cut.local(spec, tp) if cut else spec)
            for spec, cut in zip(template.inputs, cuts, strict=True)
        ]
        coordinate = torch.zeros((), dtype=torch.int64)
        differentiable = [i for i, is_live in enumerate(template.live_outputs) if is_live]
        tangents = [_empty(template.outputs[i]) for i in differentiable]
    wanted = [i for i, is_live in enumerate(template.live_inputs) if is_live]
    whole: dict[str, None] = {}

    def joint(*flat: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, coordinate, seeds = list(flat[: len(locals_)]), flat[len(locals_)], flat[len(locals_) + 1 :]
        for index in wanted:  # leaves of their own: gradients end here, at the unit's border
            inputs[index] = inputs[index].detach().requires_grad_()
        with torch.enable_grad(), as_when_run():
            outputs = _forward(template, inputs, cuts, TpGroup(tp, coordinate), whole)
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

    own = {n.target.function for n in template.graph.graph.nodes if isinstance(n.target, AppliedFunction)}
    told = types_as_in_training(spaces_from(own)) if own else nullcontext()  # the users' backwards may ask
    with _explained(tp, template), quiet_torch(), unfused(), told:
        values = (*locals_, coordinate, *tangents)
        traced = trace_values(joint, values)
    return Joint(
        traced.graph, len(locals_), len(template.outputs), tuple(differentiable), tuple(wanted), tuple(whole)
    )


@contextmanager
def _explained(tp: int, template: Template) -> Iterator[None]:
    """Turn a failure inside the trace into a PartitionError that says which lines of the user's it is about."""
    try:
        yield
    except PartitionError:
        raise
    except Exception as error:
        first = first_sentence(error)
        problem, hint = f"no backward could be traced: {first}", "write this part with other operators"
        if tp > 1:
            problem = f"cannot cut the model by tp {tp}: {first}"
            hint = "use another tp, or give the model a tp_plan that replicates this part"
        raise PartitionError(problem, lines_of(template), hint) from error


def lines_of(template: Template, named: str = "") -> str:
    """The lines of the user's that a unit comes from, if they are known: those of the operators that `named` names, if
    it has them."""
    nodes = [n for n in template.graph.graph.nodes if line_of(n)]
    found = [*map(line_of, [n for n in nodes if op_name(n.target) in named.split()] or nodes)]
    return " to ".join(dict.fromkeys(found[:1] + found[-1:]))


def _gradients(
    outputs: Sequence[tuple[torch.Tensor, torch.Tensor]], sources: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of `sources` for (output, tangent) pairs; None where nothing flows."""
    if not outputs or not sources:
        return (None,) * len(sources)
    # one call for all outputs: what they share is differentiated once
    return torch.autograd.grad([o for o, _ in outputs], sources, [t for _, t in outputs], allow_unused=True)


def _empty(spec: TensorSpec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=TORCH[spec.dtype])


def _forward(
    template: Template, inputs: Sequence[torch.Tensor], cuts: Sequence[ParamCut | None], group: TpGroup,
    whole: dict[str, None],
) -> list[torch.Tensor]:  # fmt: skip
    placed = [
        x if cut is None else CutTensor(x, cut.dim, cut.sections, is_weight=True)
        for x, cut in zip(inputs, cuts, strict=True)
    ]
    results = _Local(template.graph, group, whole).run(*placed)
    # whole at the border, so that units can be cut apart without knowing how their neighbours are laid out
    return [group.whole(result) for result in results]


class _Local(Recomputing):
    """Runs a unit's graph as one chip does; puts products that are not cut into `whole`."""

    def __init__(self, module: torch.fx.GraphModule, group: TpGroup, whole: dict[str, None]) -> None:
        super().__init__(module)
        self.group, self.whole = group, whole

    def run_node(self, n: torch.fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is operator.getitem:
            return args[0][args[1]]
        result, is_cut, name = None, is_any_cut((args, kwargs)), op_name(target)
        if is_cut:
            result = cut_result(CutCall(self.group, target, args, kwargs, self.node.meta.get("val")))
        if result is None:
            if name in PRODUCT_RULES:
                why = "whose cut dims do not match" if is_cut else "of whole operands"
                self.whole[f"{name}, {why}"] = None
            args, kwargs = tree_map_only(CutTensor, self.group.whole, (args, kwargs))
            result = _whole_result(target, args, kwargs)
        return result


def _whole_result(target: Any, args: Any, kwargs: Any) -> Any:
    between_parts = part_ops.BETWEEN_PARTS.get(target)
    if between_parts is not None:
        return between_parts(*args)
    if target is torch.ops.orchestrate.keyed_uniform.default:
        return target(args[0], args[1], None, *args[3:])
    # Strides may differ from those when the model was captured.
    if op_name(target) in VIEWS:
        return torch.reshape(*args, **kwargs)
    if op_name(target) == "view_as":
        return args[0].reshape(args[1].shape)
    if op_name(target) in NEED_ORDER:
        args = tree_map_only(torch.Tensor, torch.Tensor.contiguous, args)
    return target(*args, **kwargs)
