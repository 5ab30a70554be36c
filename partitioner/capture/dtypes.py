"""The one place where torch dtypes meet the Program's short names."""

import torch

from partitioner.program.program import TensorSpec

SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b8",
}  # fmt: skip
TORCH = {short: dtype for dtype, short in SHORT.items()}


def spec_of(value: torch.Tensor) -> TensorSpec:
    """Shape and short dtype of a (real or fake) tensor."""
    return TensorSpec(tuple(int(size) for size in value.shape), SHORT[value.dtype])
