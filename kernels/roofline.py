"""Roofline: how long an operation and a segment take on a chip, from their FLOPs and bytes alone.

An operation is bound by arithmetic or by memory: the larger of flops / (peak * efficiency) and nbytes /
(bandwidth * efficiency) (Williams, Waterman and Patterson, CACM 52, 2009). Matrix products run on the matrix
pipes at the dtype's peak; everything else runs on the vector pipes at the fp32 peak (fp64 for f64).

Kernels are issued by a host that runs ahead of the device, so a segment takes the longer of two lanes: the
sum of its operations on the device, or launch_s for each kernel on the host. Views launch nothing.

Assumes no fusion and no cache reuse between operations: each reads its operands and writes its results once.
Not modelled: efficiency by operand size, occupancy, clocks under load, and synchronisation with the host.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kernels.chips import Chip

# Names of ATen operators whose FLOPs the matrix pipes do; all attention kernels besides (see is_matmul).
MATMULS = frozenset(
    {
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "linear",
        "matmul",
        "convolution",
        "convolution_backward",
        "expert_mm",
        "expert_mm_weights",
        "_grouped_mm",
    }
)
# Program dtype -> the chip's name of the peak; integers and booleans run on the vector pipes like fp32.
PEAKS: Mapping[str, str] = {"f64": "fp64", "f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8"}
VECTOR_PEAKS: Mapping[str, str] = {"f64": "fp64"}
VECTOR_PEAK = "fp32"
# What vector code reaches of its peak; nearly always memory binds first, so this hardly matters.
VECTOR_EFFICIENCY = 0.9


class Value(Protocol):
    """The type of one result."""

    @property
    def dtype(self) -> str: ...


class OpRow(Protocol):
    """What the roofline reads of an operation."""

    @property
    def target(self) -> str: ...
    @property
    def outs(self) -> Sequence[Value]: ...
    @property
    def flops(self) -> int: ...
    @property
    def read_bytes(self) -> int: ...
    @property
    def write_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SegmentTime:
    """A segment's two lanes: the device works for `device_s`, the host issues kernels for `host_s`."""

    device_s: float
    host_s: float

    @property
    def seconds(self) -> float:
        """The longer lane; the other is hidden behind it."""
        return max(self.device_s, self.host_s)


def is_view(op: OpRow) -> bool:
    """True for an operation that moves nothing and computes nothing."""
    return not (op.flops or op.read_bytes or op.write_bytes)


def is_matmul(op: OpRow) -> bool:
    """True for an operation that the matrix pipes do."""
    name = op.target.split(".")[1] if "." in op.target else op.target
    return name in MATMULS or "scaled_dot_product" in name


def device_seconds(op: OpRow, chip: Chip) -> float:
    """Time on the device, launch not included; nothing for a view."""
    memory = memory_seconds(op.read_bytes + op.write_bytes, chip)
    if not op.flops:
        return memory
    dtype = op.outs[0].dtype if op.outs else "f32"
    if is_matmul(op):
        rate = chip.peak(PEAKS.get(dtype, VECTOR_PEAK)) * chip.matmul_efficiency
    else:
        rate = chip.peak(VECTOR_PEAKS.get(dtype, VECTOR_PEAK)) * VECTOR_EFFICIENCY
    return max(op.flops / rate, memory)


def memory_seconds(nbytes: float, chip: Chip) -> float:
    """Time to move `nbytes` through the chip's memory."""
    return nbytes / (chip.memory_bytes_per_s * chip.memory_efficiency)


def segment_time(ops: Iterable[OpRow], chip: Chip) -> SegmentTime:
    """Both lanes of a straight run of operations."""
    kernels = [op for op in ops if not is_view(op)]
    device = sum(device_seconds(op, chip) for op in kernels)
    return SegmentTime(device, len(kernels) * chip.launch_s)
