"""What a forward leaves in buffers: values of their own, with the dtype and the shape of what it found there."""

from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack

from comms.errors import CaptureError
from partitioner.capture.exact_float64 import NARROWER, ExactFloat64
from partitioner.capture.forwards.borrowed_module import Borrowed
from partitioner.capture.source_lines import source_line


def require_same_form(name: str, held: tuple[Any, ...], made: torch.fx.Node) -> None:
    """Refuse that a buffer of a (shape, strides, dtype) becomes another. Raises CaptureError."""
    shape, dtype, value = list(held[0]), held[-1], made.meta["val"]
    is_copy = any(isinstance(mode, ExactFloat64) for mode in _get_current_function_mode_stack())  # in float64
    if list(value.shape) != shape or (value.dtype != dtype and not (is_copy and value.dtype in NARROWER)):
        before, after = (f"{str(d).removeprefix('torch.')} of shape {list(s)}"
                         for d, s in ((dtype, shape), (value.dtype, value.shape)))  # fmt: skip
        problem = f"the forward makes the buffer {name}, {before}, one of {after}"
        raise CaptureError(problem, source_line(made), "register it as what it becomes")


def require_own_values(lent: Borrowed) -> None:
    """Refuse buffers that after a forward follow other tensors, or no longer each other. Raises CaptureError."""
    left: dict[int, tuple[str, torch.Tensor]] = {}  # by what was registered before
    for path, child, held in lent.attributes:
        for name, before in lent.contents[id(held["_buffers"])][2].items():
            now, full = child._buffers.get(name), f"{path}.{name}" if path else name
            if before is None or now is None:
                continue
            if left.setdefault(id(before), (full, now))[1] is not now:
                problem = f"{left[id(before)][0]} and {full} are one buffer, of which the forward assigns one"
                raise CaptureError(problem, path or type(child).__name__, "write it in place, with copy_()")
    params = [(f"the parameter {n}", p, p.requires_grad) for n, p in lent.module.named_parameters()]
    buffers = [(f"the buffer {n}", v, lent.stand_ins[i]._version > 0) for i, (n, v) in left.items()]
    places: dict[int, tuple[str, bool]] = {}  # by memory
    for name, value, moves in (each for each in (*params, *buffers) if each[1].layout is torch.strided):
        first, moved = places.setdefault(value.untyped_storage()._cdata, (name, moves))
        if first != name and (moves or moved):
            problem = f"the forward leaves {name} in the memory of {first}, which changes"
            raise CaptureError(problem, type(lent.module).__name__, "assign a clone")
