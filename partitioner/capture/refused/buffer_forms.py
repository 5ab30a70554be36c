"""What a forward leaves in buffers: values of their own, with the dtype and the shape of what it found there.

Else whole numbers that became fractions would be cut off, and what is a view of a parameter would not follow it.
"""

from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack

from comms.errors import CaptureError
from partitioner.capture.exact_float64 import NARROWER, ExactFloat64
from partitioner.capture.forwards.borrowed_module import Borrowed
from partitioner.capture.pure_graph import source_line


def require_same_form(name: str, held: tuple[Any, ...], made: torch.fx.Node) -> None:
    """Refuse that a buffer of a (shape, strides, dtype) becomes another. Raises CaptureError."""
    shape, dtype, value = held[0], held[-1], made.meta["val"]
    # numbers that a float64 copy makes are narrower for being a copy alone
    is_copy = any(isinstance(mode, ExactFloat64) for mode in _get_current_function_mode_stack())
    if value.shape == shape and (value.dtype == dtype or (value.dtype in NARROWER and is_copy)):
        return
    before, after = (f"{str(d).removeprefix('torch.')} of shape {list(s)}"
                     for d, s in ((dtype, shape), (value.dtype, value.shape)))  # fmt: skip
    raise CaptureError(f"the forward makes the buffer {name}, {before}, one of {after}", source_line(made),
                       "register it as what it becomes")  # fmt: skip


def require_own_values(lent: Borrowed) -> None:
    """Refuse buffers that after a forward follow other tensors, or no longer each other. Raises CaptureError."""
    left: dict[int, tuple[str, torch.Tensor]] = {}  # by what was registered before
    for path, child, held in lent.attributes:
        for name, before in lent.contents[id(held["_buffers"])][2].items():
            now, full = child._buffers.get(name), f"{path}.{name}" if path else name
            if before is None or now is None:
                continue
            first, value = left.setdefault(id(before), (full, now))
            if value is not now:
                problem = f"{first} and {full} are one buffer, and the forward assigns one of them"
                raise CaptureError(problem, path or type(child).__name__, "write it in place, with copy_()")
    params = [(f"the parameter {n}", p, p.requires_grad) for n, p in lent.module.named_parameters()]
    buffers = [(f"the buffer {n}", v, lent.stand_ins[i]._version > 0) for i, (n, v) in left.items()]
    sharing: dict[int, list[tuple[str, bool]]] = {}  # by memory
    for name, value, moves in (*params, *buffers):
        if value.layout is torch.strided:
            sharing.setdefault(value.untyped_storage()._cdata, []).append((name, moves))
    for one, *others in sharing.values():
        if others and any(moves for _, moves in (one, *others)):
            problem = f"the forward leaves {others[0][0]} in the memory of {one[0]}, which changes"
            raise CaptureError(problem, type(lent.module).__name__, "assign a clone")
