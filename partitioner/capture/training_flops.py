"""FLOPs of training a slice of a model once, as `torch.utils.flop_counter` counts them in an eager run.

Products of matrices and convolutions only (the convention of MFU), forward and backward as far as gradients flow.
Attention counts as if written out: two products forward and four backward, causal or not. Of a graph below autograd
`captured_graph.product_flops` counts the same, and `op_flops` what operators really do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as trees
from torch.utils.flop_counter import FlopCounterMode

from partitioner.capture.captured_graph import KERNELS
from partitioner.capture.pure_graph import UnderModes, unfused


class _Counted(UnderModes):
    """Only sizes are looked at: those that follow from constants are what they were at the capture."""

    def run_node(self, n: torch.fx.Node) -> Any:
        """A node's result."""
        try:
            return super().run_node(n)
        except DynamicOutputShapeException:
            return trees.tree_map_only(torch.Tensor, _stand_in, n.meta["val"])


def forward_flops(module: torch.fx.GraphModule) -> int:
    """FLOPs of a forward."""
    if not any(n.op == "call_function" for n in module.graph.nodes):
        return 0
    values, mode = _stand_ins(module)
    with torch.no_grad(), _counting(mode) as counter:
        _Counted(module).run(*values)
    return int(counter.get_total_flops())


def training_flops(
    module: torch.fx.GraphModule, live_inputs: Sequence[bool], live_outputs: Sequence[bool]
) -> tuple[int, int]:
    """(forward, forward and backward), each operation once; live: on the way of a gradient."""
    values, mode = _stand_ins(module)
    with _counting(mode) as counter:
        leaves = [v.detach().requires_grad_(is_live) for v, is_live in zip(values, live_inputs, strict=True)]
        with torch.enable_grad():
            outputs = _Counted(module, garbage_collect_values=False).run(*leaves)
        once = int(counter.get_total_flops())
        ends = [o for o, is_live in zip(outputs, live_outputs, strict=True) if is_live and o.requires_grad]
        sources = [v for v in leaves if v.requires_grad]
        if ends and sources:
            torch.autograd.grad(ends, sources, [torch.ones_like(e) for e in ends], allow_unused=True)
    return once, int(counter.get_total_flops())


def _stand_ins(module: torch.fx.GraphModule) -> tuple[list[torch.Tensor], FakeTensorMode]:
    """What stands for a graph's inputs; from their shapes, as torch takes longer to make them from one another."""
    shapes = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    with (mode := FakeTensorMode(allow_non_fake_inputs=True)):
        return [_stand_in(v) for v in shapes], mode


def _stand_in(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


@contextmanager
def _counting(mode: FakeTensorMode) -> Iterator[FlopCounterMode]:
    with mode, unfused(), FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        yield counter
