"""What chips compute and how fast: the chip catalog, times of operations, optimizers and compiled segments.

The functions here are what others need; they are imported when first used, so that `import kernels` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.backend import OpCode, compile_segment
    from kernels.chips import Chip, ChipKind, chip_keys, load_chip, parse_chip
    from kernels.optimizers import FlatOptimizer, OptimizerSpec, require_elementwise, states_per_element
    from kernels.roofline import SegmentTime, segment_time

__all__ = [
    "Chip",
    "ChipKind",
    "FlatOptimizer",
    "OpCode",
    "OptimizerSpec",
    "SegmentTime",
    "chip_keys",
    "compile_segment",
    "load_chip",
    "parse_chip",
    "require_elementwise",
    "segment_time",
    "states_per_element",
]

_HOMES = {
    "Chip": "kernels.chips",
    "ChipKind": "kernels.chips",
    "FlatOptimizer": "kernels.optimizers",
    "OpCode": "kernels.backend",
    "OptimizerSpec": "kernels.optimizers",
    "SegmentTime": "kernels.roofline",
    "chip_keys": "kernels.chips",
    "compile_segment": "kernels.backend",
    "load_chip": "kernels.chips",
    "parse_chip": "kernels.chips",
    "require_elementwise": "kernels.optimizers",
    "segment_time": "kernels.roofline",
    "states_per_element": "kernels.optimizers",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
