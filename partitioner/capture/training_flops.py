"""FLOPs of training a slice of a model once, as `torch.utils.flop_counter` counts them in an eager run.

Products of matrices and convolutions only (the convention of MFU), forward and backward as far as gradients flow.
Attention counts as if written out: two products forward and four backward, causal or not. Of a graph below autograd
`captured_graph.product_flops` counts the same, and `op_flops` what operators really do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from partitioner.capture.captured_graph import KERNELS
from partitioner.capture.forwards.checkpoints import regions_of
from partitioner.capture.pure_graph import UnderModes, trace_values, unfused
from partitioner.capture.recomputing import Recomputing, as_when_run


def forward_flops(module: torch.fx.GraphModule) -> int:
    """FLOPs of a forward."""
    with (mode := FakeTensorMode(allow_non_fake_inputs=True)), torch.no_grad():
        places = [n for n in module.graph.nodes if n.op == "placeholder"]
        values = [torch.empty_like(n.meta["val"], device="cpu") for n in places]
        return _counted(UnderModes(module).run, values, mode)


def training_flops(
    module: torch.fx.GraphModule, live_inputs: Sequence[bool], live_outputs: Sequence[bool]
) -> tuple[int, int]:
    """(forward and backward, computed a second time in the backward); live: on the way of a gradient."""
    shapes = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    with (mode := FakeTensorMode(allow_non_fake_inputs=True)):
        values = [torch.empty_like(v, device="cpu", requires_grad=False) for v in shapes]

    def once(*values: torch.Tensor) -> list[torch.Tensor]:
        return _trained(UnderModes(module, garbage_collect_values=False), values)

    def recomputing(*values: torch.Tensor) -> list[torch.Tensor]:
        with as_when_run():
            return _trained(Recomputing(module), values)

    def _trained(run: torch.fx.Interpreter, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [v.detach().requires_grad_(is_live) for v, is_live in zip(values, live_inputs, strict=True)]
        with torch.enable_grad():
            outputs = run.run(*leaves)
        ends = [o for o, is_live in zip(outputs, live_outputs, strict=True) if is_live and o.requires_grad]
        sources = [v for v in leaves if v.requires_grad]
        if not ends or not sources:
            return list(outputs)
        grads: Sequence[torch.Tensor | None] = torch.autograd.grad(
            ends, sources, [torch.ones_like(e) for e in ends], allow_unused=True
        )
        return [*outputs, *(g for g in grads if g is not None)]

    flops = _counted(once, values, mode)
    if not any(map(regions_of, module.graph.nodes)):
        return flops, 0
    traced = trace_values(recomputing, values)
    traced.graph.eliminate_dead_code()  # what a second run computes and nobody reads, as lowering does
    return flops, _counted(torch.fx.Interpreter(traced).run, values, mode) - flops


def _counted(run: Callable[..., Any], values: Sequence[torch.Tensor], mode: FakeTensorMode) -> int:
    with mode, unfused(), FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        run(*values)
    return int(counter.get_total_flops())
