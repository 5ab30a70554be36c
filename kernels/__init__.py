"""What chips compute and how fast: the chip catalog, times of operations, optimizers and compiled segments.

The functions here are what others need; they are imported when first used, so that `import kernels` loads no torch.
"""

from typing import TYPE_CHECKING

from lazy_loader import attach

if TYPE_CHECKING:
    from kernels.backend import OpCode, compile_segment
    from kernels.chips import Chip, ChipKind, chip_keys, load_chip, parse_chip
    from kernels.optimizers import FlatOptimizer, OptimizerSpec, states_per_element
    from kernels.roofline import SegmentTime, segment_time
    from kernels.trials.optimizer_trials import scope_of

__getattr__, __dir__, __all__ = attach(
    __name__,
    submod_attrs={
        "backend": ["OpCode", "compile_segment"],
        "chips": ["Chip", "ChipKind", "chip_keys", "load_chip", "parse_chip"],
        "trials.optimizer_trials": ["scope_of"],
        "optimizers": ["FlatOptimizer", "OptimizerSpec", "states_per_element"],
        "roofline": ["SegmentTime", "segment_time"],
    },
)
