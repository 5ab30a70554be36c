"""FLOPs of training a slice of a model once, as `torch.utils.flop_counter` counts them in an eager run.

Products of matrices and convolutions only (the convention of MFU), forward and backward as far as gradients flow.
Attention counts as if written out: two products forward and four backward, causal or not. What operators really do is
counted beside it (`captured_graph.op_flops`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from partitioner.capture.forwards.checkpoints import regions_of
from partitioner.capture.forwards.grouped_products import GROUPED, grouped_flops
from partitioner.capture.pure_graph import trace_values
from partitioner.capture.recomputing import Recomputing, as_when_run

aten = torch.ops.aten


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward(_grad: Any, *args: Any, **_: Any) -> int:
    return 2 * _attention(*args)


# what torch does not count: the attention kernels of CPUs, and grouped products
KERNELS = {
    GROUPED: grouped_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def training_flops(
    module: torch.fx.GraphModule, live_inputs: Sequence[bool], live_outputs: Sequence[bool]
) -> tuple[int, int]:
    """(forward and backward, computed a second time in the backward); live: on the way of a gradient."""
    shapes = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    with (mode := FakeTensorMode(allow_non_fake_inputs=True)):
        values = [torch.empty_like(v, device="cpu", requires_grad=False) for v in shapes]

    def once(*values: torch.Tensor) -> list[torch.Tensor]:
        return _trained(torch.fx.Interpreter(module, garbage_collect_values=False), values)

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
    with mode, FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        run(*values)
    return int(counter.get_total_flops())
